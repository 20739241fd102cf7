#!lua
-- Applies one lease: its codes join the end of the pool's window, once, and only onto the lease before it.
--
-- KEYS
--   1  generation    hash
--   2  totals        hash
--   3  window        list
--   4  pool          hash
-- ARGV
--   1  generation that the KEYS were made for
--   2  lease id
--   3  id of the lease before it in the chain, '' for the first
--   4  stock version of the pool when it was leased
--   5  low water: codes below which the pool asks for more
--   6  and on: packed codes, at least one
-- Returns {status, codes in the window}
--   OK      applied
--   DONE    was applied before; nothing was written
--   FORKED  then the last lease id: it is neither this one nor the one before.  Nothing was written
--   LOST    generation or identity do not agree.  Nothing was written
-- Cost: 1 to 2 us a code

local open, replid = unpack(redis.call('HMGET', KEYS[1], 'open', 'replid'))
local present = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
local length = redis.call('LLEN', KEYS[3])
if open ~= ARGV[1] or replid ~= present then
  return {'LOST', length}
end
local last, stock = unpack(redis.call('HMGET', KEYS[4], 'lease', 'stock'))
last, stock = last or '', tonumber(stock or 0)
local restocked = tonumber(redis.call('HGET', KEYS[2], 'restocked') or 0)
local version, low = tonumber(ARGV[4]), tonumber(ARGV[5])
if ARGV[2] == '' or ARGV[2] == ARGV[3] or #ARGV < 6 or not stock or not restocked
  or not version or version % 1 ~= 0 or version < 0 or version > 9007199254740991
  or not low or low % 1 ~= 0 or low < 0 or low > 9007199254740991 then
  return redis.error_reply('BADCALL restock')
end
for i = 6, #ARGV do
  if not string.match(ARGV[i], '^%x+\t%d+\t%d+\t[^%c]+\t[^%c]+$') then
    return redis.error_reply('BADCALL argument ' .. i .. ' of restock')
  end
end
if last == ARGV[2] then
  return {'DONE', length}
end
if last ~= ARGV[3] then
  return {'FORKED', length, last}
end

redis.call('HSET', KEYS[4], 'lease', ARGV[2], 'low', string.format('%d', low),
  'stock', string.format('%d', math.max(stock, version)))
for i = 6, #ARGV, 500 do -- as many at once as Lua's stack takes well
  redis.call('RPUSH', KEYS[3], unpack(ARGV, i, math.min(i + 499, #ARGV)))
end
redis.call('HINCRBY', KEYS[2], 'restocked', #ARGV - 5)
return {'OK', length + #ARGV - 5}
