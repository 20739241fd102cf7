#!lua
-- Raises the fence of a partition: from here on no script accepts an older catalogue.
--
-- KEYS
--   1  fence    string
-- ARGV
--   1  catalogue version
-- Returns {status, fence now}
--   OK    the fence is at this version or above
--   LOST  there is no fence: the partition has no data, and opens at the store's version.  Nothing was written
-- Cost: 1 us

local version = tonumber(ARGV[1])
local stored = redis.call('GET', KEYS[1])
local fence = tonumber(stored or nil)
if not version or version % 1 ~= 0 or version < 0 or version > 9007199254740991 or (stored and not fence) then
  return redis.error_reply('BADCALL publish')
end
if not fence then
  return {'LOST', ''}
end

if version > fence then
  redis.call('SET', KEYS[1], string.format('%d', version))
  fence = version
end
return {'OK', string.format('%d', fence)}
