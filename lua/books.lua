#!lua flags=no-writes
-- The books of a partition as Redis has them, read at one moment.
--
-- KEYS
--   1  generation    hash
--   2  totals        hash
--   3  outbox        stream
--   4  and on: for each pool its window (list) and its pool hash
-- ARGV
--   1  generation that the KEYS were made for
-- Returns {status, open generation, ...}
--   OK     then seq, codes, restocked, popped, set_aside, taken_back, withdrawn, a sequence that was flushed and that
--          the store lost ('0' if it did not), bytes in the outbox, entries in it, the last sequences flushed
--          ('3,4,1'); then for each pool: codes in its window, last lease id, stock version, stock version at which it
--          was exhausted ('' if not)
--   MOVED  another generation is open
-- Cost: 2 us a pool

local open = redis.call('HGET', KEYS[1], 'open') or ''
local flushed = redis.call('HGET', KEYS[2], 'flushed')
if #KEYS % 2 ~= 1 then
  return redis.error_reply('BADCALL books')
end
if open ~= ARGV[1] then
  return {'MOVED', open}
end
local reply = {'OK', open}
for i, count in ipairs(redis.call('HMGET', KEYS[2],
  'seq', 'codes', 'restocked', 'popped', 'set_aside', 'taken_back', 'withdrawn', 'lost', 'bytes')) do
  reply[2 + i] = count or '0'
end
reply[12] = string.format('%d', redis.call('XLEN', KEYS[3]))
reply[13] = flushed or ''
for i = 4, #KEYS, 2 do
  local lease, stock, exhausted = unpack(redis.call('HMGET', KEYS[i + 1], 'lease', 'stock', 'exhausted'))
  reply[#reply + 1] = string.format('%d', redis.call('LLEN', KEYS[i]))
  reply[#reply + 1] = lease or ''
  reply[#reply + 1] = stock or '0'
  reply[#reply + 1] = exhausted or ''
end
return reply
