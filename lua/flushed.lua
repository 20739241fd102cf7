#!lua flags=allow-oom
-- Takes entries out of the outbox that are in the ledger (or parked) for good.
--
-- KEYS
--   1  totals    hash
--   2  outbox    stream
-- ARGV
--   1  consumer group
--   2  outbox sequence of one of these entries that is in the ledger, 0 if none is
--   then per entry: its stream id, the codes and the bytes that it held
-- Returns {status, entries taken out}
--   OK  each entry that was still there is acknowledged, deleted and no longer counted; if there was any, the sequence
--       is among the last 16 noted.  A store that came back older lacks at least one of them: workers commit in
--       another order than they acknowledge, but each has one flush under way, and there are fewer than 16
-- Cost: 2 us an entry

local seq = tonumber(ARGV[2])
local flushed, codes, counted = unpack(redis.call('HMGET', KEYS[1], 'flushed', 'codes', 'bytes'))
flushed, codes, counted = flushed or '', tonumber(codes or 0), tonumber(counted or 0)
if not seq or seq % 1 ~= 0 or seq < 0 or seq > 9007199254740991 or string.find(flushed, '[^%d,]') or not codes
  or not counted or counted % 1 ~= 0 or #ARGV < 2 or (#ARGV - 2) % 3 ~= 0 then
  return redis.error_reply('BADCALL flushed')
end
for i = 3, #ARGV, 3 do
  local ms, nth = string.match(ARGV[i], '^(%d+)%-(%d+)$')
  local held, bytes = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  if not ms or #ms > 19 or #nth > 19 -- a stream id is two numbers below 2^64, ours are far below
    or not held or held % 1 ~= 0 or held < 0 or held > 9007199254740991
    or not bytes or bytes % 1 ~= 0 or bytes < 0 or bytes > 9007199254740991 then
    return redis.error_reply('BADCALL argument ' .. i .. ' of flushed')
  end
end
if redis.call('EXISTS', KEYS[2]) == 0 then
  return {'OK', 0} -- the whole outbox is gone; there is nothing to count
end

local taken, held, freed = 0, 0, 0
for i = 3, #ARGV, 3 do
  redis.call('XACK', KEYS[2], ARGV[1], ARGV[i])
  if redis.call('XDEL', KEYS[2], ARGV[i]) == 1 then
    taken, held, freed = taken + 1, held + tonumber(ARGV[i + 1]), freed + tonumber(ARGV[i + 2])
  end
end
if held > 0 then
  redis.call('HINCRBY', KEYS[1], 'codes', -held)
end
if freed > 0 then
  redis.call('HINCRBY', KEYS[1], 'bytes', -freed)
end
if taken > 0 and seq > 0 then
  local _, others = string.gsub(flushed, '%d+', '')
  if others == 16 then
    flushed = string.match(flushed, ',(.*)')
  end
  redis.call('HSET', KEYS[1], 'flushed', (others > 0 and flushed .. ',' or '') .. string.format('%d', seq))
end
return {'OK', taken}
