#!lua flags=allow-oom
-- Notes that the store came back without entries that it had: later ones hide the gap, this note does not go away.
--
-- KEYS
--   1  totals    hash
-- ARGV
--   1  an outbox sequence that was flushed and that the store does not have
-- Returns {status}
--   OK    the note is there, from now or from before
--   GONE  nothing of the generation is here any more.  Nothing was written
-- Cost: 1 us

local seq = tonumber(ARGV[1])
local there = redis.call('EXISTS', KEYS[1])
local lost = there == 1 and redis.call('HGET', KEYS[1], 'lost')
if not seq or seq % 1 ~= 0 or seq < 1 or seq > 9007199254740991 then
  return redis.error_reply('BADCALL distrust')
end
if there == 0 then
  return {'GONE'}
end
if not lost then
  redis.call('HSET', KEYS[1], 'lost', string.format('%d', seq))
end
return {'OK'}
