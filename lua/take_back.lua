#!lua
-- Takes codes from the front of a window and writes down in the outbox which: the store puts them back into stock.
-- Until it has, the pool is not exhausted.
--
-- KEYS
--   1  generation    hash
--   2  totals        hash
--   3  window        list
--   4  outbox        stream
--   5  pool          hash
-- ARGV
--   1  generation that the KEYS were made for
--   2  codes to take at most, 1 to 1000
--   3  codes that the outbox may hold
-- Returns {status, ...}
--   OK       then the packed codes that were taken; none if the window is empty
--   BACKLOG  the outbox is at its bound.  Nothing was written
--   LOST     generation or identity do not agree.  Nothing was written
-- Cost: 1 us a code

local open, replid = unpack(redis.call('HMGET', KEYS[1], 'open', 'replid'))
local present = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
if open ~= ARGV[1] or replid ~= present then
  return {'LOST'}
end
local seq, codes, taken_back, bytes = unpack(redis.call('HMGET', KEYS[2], 'seq', 'codes', 'taken_back', 'bytes'))
seq, codes, taken_back = tonumber(seq or 0), tonumber(codes or 0), tonumber(taken_back or 0)
bytes = tonumber(bytes or 0)
redis.call('XLEN', KEYS[4]) -- these two raise on a wrong type, now rather than after the first write
redis.call('HGET', KEYS[5], 'stock')
local wanted, bound = tonumber(ARGV[2]), tonumber(ARGV[3])
if not seq or seq % 1 ~= 0 or not codes or codes % 1 ~= 0 or not taken_back or taken_back % 1 ~= 0
  or not bytes or bytes % 1 ~= 0
  or not wanted or wanted % 1 ~= 0 or wanted < 1 or wanted > 1000
  or not bound or bound % 1 ~= 0 or bound < 1 or bound > 9007199254740991 then
  return redis.error_reply('BADCALL take_back')
end
if codes >= bound then
  return {'BACKLOG'}
end
local taken = redis.call('LRANGE', KEYS[3], 0, math.min(wanted, bound - codes) - 1)
if #taken == 0 then
  return {'OK'}
end

local asides = table.concat(taken, '\30')
local entry = redis.call('XADD', KEYS[4], '*', 'generation', open, 'seq', string.format('%d', seq + 1),
  'codes', string.format('%d', #taken), 'bytes', string.format('%d', #asides + 1),
  'issued', '', 'asides', asides, 'why', 'taken_back')
redis.call('HSET', KEYS[2], 'seq', string.format('%d', seq + 1))
redis.call('HINCRBY', KEYS[2], 'codes', #taken)
redis.call('HINCRBY', KEYS[2], 'bytes', #asides + 1)
redis.call('HINCRBY', KEYS[2], 'taken_back', #taken)
redis.call('HSET', KEYS[5], 'back', entry)
redis.call('HDEL', KEYS[5], 'exhausted')
redis.call('LPOP', KEYS[3], #taken)
return {'OK', unpack(taken)}
