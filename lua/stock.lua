#!lua
-- Tells a partition that a pool's stock has grown: what was exhausted at an older stock version is no longer.
--
-- KEYS
--   1  generation    hash
--   2  pool          hash
--   3  demand        sorted set
-- ARGV
--   1  generation that the KEYS were made for
--   2  pool id
--   3  stock version, only ever raised
-- Returns {status, stock version now}
--   OK    the pool's stock version is at least this one, and the pool is in demand if it was raised
--   LOST  generation or identity do not agree.  Nothing was written
-- Cost: 3 us

local open, replid = unpack(redis.call('HMGET', KEYS[1], 'open', 'replid'))
local present = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
local version = tonumber(ARGV[3])
local stock = tonumber(redis.call('HGET', KEYS[2], 'stock') or 0)
redis.call('ZCARD', KEYS[3])
if not version or version % 1 ~= 0 or version < 0 or version > 9007199254740991 or ARGV[2] == '' or not stock then
  return redis.error_reply('BADCALL stock')
end
if open ~= ARGV[1] or replid ~= present then
  return {'LOST', string.format('%d', stock)}
end

if version > stock then
  redis.call('HSET', KEYS[2], 'stock', string.format('%d', version))
  redis.call('ZADD', KEYS[3], 0, ARGV[2])
end
return {'OK', string.format('%d', math.max(stock, version))}
