#!lua flags=no-writes
-- The read-only twin of issue: answers repeated requests when memory is full and issue is refused, and, with no
-- request at all, is the bare check that a catalogue version is in force.
--
-- KEYS
--   1  generation    hash
--   2  fence         string
--   3  and on: for each request its replay record (string)
-- ARGV
--   1  generation that the KEYS were made for
--   2  catalogue version that the caller decides by
--   3  nonce, returned
--   4  and on: for each request its payload
-- Returns {status, nonce, open generation, now, ...}
--   OK     then for each request a status and its detail:
--            REPLAY  the record
--            REUSED  '' : the record has another payload
--            MISS    '' : no record
--   STALE  then the fence: it is above the catalogue version
--   LOST   generation or identity do not agree
-- Cost: 2 us and 1 us a request

local nonce = ARGV[3]
local now = tonumber(redis.call('TIME')[1])
local open, replid = unpack(redis.call('HMGET', KEYS[1], 'open', 'replid'))
local present = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
local fence = tonumber(redis.call('GET', KEYS[2]) or nil)
if open ~= ARGV[1] or replid ~= present or not fence then
  return {'LOST', nonce, open or '', now}
end
local version = tonumber(ARGV[2])
if not version or version % 1 ~= 0 or #KEYS - 2 ~= #ARGV - 3 then
  return redis.error_reply('BADCALL replay')
end
if fence > version then
  return {'STALE', nonce, open, now, string.format('%d', fence)}
end

local reply = {'OK', nonce, open, now}
for i = 3, #KEYS do
  local payload, record = ARGV[i + 1], redis.call('GET', KEYS[i])
  if not record then
    reply[2 * i - 1], reply[2 * i] = 'MISS', ''
  else
    if string.sub(record, 2, #payload + 2) == payload .. '\n' then
      reply[2 * i - 1], reply[2 * i] = 'REPLAY', record
    else
      reply[2 * i - 1], reply[2 * i] = 'REUSED', ''
    end
  end
end
return reply
