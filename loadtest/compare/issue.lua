#!lua
-- Gives a code to one request, or says why not.  Read, decide, write: nothing that can be refused comes after
-- the first write.
--
-- KEYS
--   1  replay record                  string
--   2  codes of the campaign          list of code, serial, expiry (Unix seconds), joined by tabs
--   3  used by campaign               hash
--   4  used by distributor and day    hash
--   5  used by terminal and day       hash
--   6  outbox                         stream
-- ARGV
--   1  request id    2  distributor    3  terminal    4  product ids, joined by commas
--   5  campaign      6  category       7  product that matched
--   8  most of the campaign    9  most of the distributor a day    10  most of the terminal a day
-- Returns {status, campaign, category, product, code, serial, expiry, issued at (both Unix seconds, as text)}
--   ISSUED, REPLAY
-- or {status}
--   REUSED     the record that was there is of another terminal or other products
--   CAPPED     a cap is reached
--   EXHAUSTED  no code is left
-- Fields of past days stay in 4 and 5: the server of a benchmark is thrown away.

local record_seconds = 86400
local request_id, distributor, terminal, products = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local campaign, category, product = ARGV[5], ARGV[6], ARGV[7]

-- read and decide
local record = redis.call('GET', KEYS[1])
if record then
  local payload_terminal, payload_products, issued = string.match(record, '^([^\t]*)\t([^\t]*)\t(.*)$')
  if payload_terminal ~= terminal or payload_products ~= products then
    return {'REUSED'}
  end
  return {'REPLAY', string.match(issued, '^([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)$')}
end

local now = tonumber(redis.call('TIME')[1])
local day = string.format(':%d', math.floor(now / 86400))
local counters = {
  {KEYS[3], campaign, tonumber(ARGV[8])},
  {KEYS[4], campaign .. ':' .. distributor .. day, tonumber(ARGV[9])},
  {KEYS[5], campaign .. ':' .. terminal .. day, tonumber(ARGV[10])},
}
for i = 1, 3 do
  local counter = counters[i]
  local used = tonumber(redis.call('HGET', counter[1], counter[2]) or '0')
  if not used or not counter[3] then
    return redis.error_reply('BADCALL a cap or its counter is no number')
  end
  if used >= counter[3] then
    return {'CAPPED'}
  end
end

local head = redis.call('LINDEX', KEYS[2], 0)
if not head then
  return {'EXHAUSTED'}
end
local code, serial, expiry = string.match(head, '^([^\t]+)\t([^\t]+)\t(%d+)$')
if not code then
  return redis.error_reply('BADCALL a code is not code, serial, expiry')
end

-- write: the only one that could still be refused, for the type of its key, is the first
local issued_at = string.format('%d', now)
redis.call('XADD', KEYS[6], '*', 'request_id', request_id, 'distributor_id', distributor, 'terminal_id', terminal,
  'product_ids', products, 'campaign_id', campaign, 'category_id', category, 'product_id', product,
  'voucher_code', code, 'serial_number', serial, 'expires_at', expiry, 'issued_at', issued_at)
redis.call('SET', KEYS[1], table.concat(
  {terminal, products, campaign, category, product, code, serial, expiry, issued_at}, '\t'), 'EX', record_seconds)
for i = 1, 3 do
  redis.call('HINCRBY', counters[i][1], counters[i][2], 1)
end
redis.call('LPOP', KEYS[2])
return {'ISSUED', campaign, category, product, code, serial, expiry, issued_at}
