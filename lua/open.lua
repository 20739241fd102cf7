#!lua flags=allow-oom
-- Opens a generation under the identity that this server has now: a new one after a roll, the same one when the
-- data is known to be the same, or the same one when its records are all restored.  Also with memory at its limit:
-- what a roll leaves behind is freed after it.
--
-- KEYS
--   1  generation    hash
--   2  fence         string
-- ARGV
--   1  generation that is open now, '' if there is none
--   2  generation to open
--   3  master_replid that was examined
--   4  run_id that was examined
--   5  catalogue version, the least the fence will be
--   6  1 if replay records are still being restored, else 0
-- Returns {status, open generation}
--   OK     open
--   MOVED  another generation is open.  Nothing was written
--   LOST   the server is no longer the one that was examined.  Nothing was written
-- Cost: 3 us

local open = redis.call('HGET', KEYS[1], 'open') or ''
local info = redis.call('INFO', 'replication')
local stored = redis.call('GET', KEYS[2])
local fence, version = tonumber(stored or 0), tonumber(ARGV[5])
local generation = tonumber(ARGV[2])
if not version or version % 1 ~= 0 or version < 0 or version > 9007199254740991 or not fence
  or not generation or generation < 1 or generation > 9007199254740991 or string.format('%d', generation) ~= ARGV[2]
  or ARGV[3] == '' or ARGV[4] == '' or (ARGV[6] ~= '0' and ARGV[6] ~= '1') then
  return redis.error_reply('BADCALL open')
end
if open ~= ARGV[1] then
  return {'MOVED', open}
end
if string.match(info, 'master_replid:(%w+)') ~= ARGV[3] then
  return {'LOST', open}
end

redis.call('HSET', KEYS[1], 'open', ARGV[2], 'replid', ARGV[3], 'run_id', ARGV[4])
if ARGV[6] == '1' then
  redis.call('HSET', KEYS[1], 'restoring', '1')
else
  redis.call('HDEL', KEYS[1], 'restoring')
end
redis.call('SET', KEYS[2], string.format('%d', math.max(fence, version)))
return {'OK', ARGV[2]}
