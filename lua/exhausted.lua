#!lua
-- Writes down that a pool had nothing left to lease at a stock version, after a lease: only while both are current.
--
-- KEYS
--   1  generation    hash
--   2  pool          hash
--   3  outbox        stream
-- ARGV
--   1  generation that the KEYS were made for
--   2  stock version at which the store had nothing left
--   3  id of the last lease of the pool, '' if there was none
-- Returns {status}
--   OK       noted: until the stock version is raised, an empty window means that the pool is exhausted
--   CHANGED  stock or lease moved on meanwhile, or codes are on their way back to stock.  Nothing was written
--   LOST     generation or identity do not agree.  Nothing was written
-- Cost: 4 us

local open, replid = unpack(redis.call('HMGET', KEYS[1], 'open', 'replid'))
local present = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
local version = tonumber(ARGV[2])
local stock, lease, back = unpack(redis.call('HMGET', KEYS[2], 'stock', 'lease', 'back'))
stock = tonumber(stock or 0)
if not version or version % 1 ~= 0 or version < 0 or version > 9007199254740991 or not stock then
  return redis.error_reply('BADCALL exhausted')
end
if open ~= ARGV[1] or replid ~= present then
  return {'LOST'}
end
if stock > version or (lease or '') ~= ARGV[3] then
  return {'CHANGED'}
end
-- An entry leaves the outbox when what it holds is in the store and the stock version is raised, so what was taken back
-- last or before is on its way as long as anything so old is there.
if back and #redis.call('XRANGE', KEYS[3], '-', back, 'COUNT', 1) > 0 then
  return {'CHANGED'}
end

local at = string.format('%d', version)
redis.call('HSET', KEYS[2], 'stock', at, 'exhausted', at)
return {'OK'}
