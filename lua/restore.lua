#!lua flags=allow-oom
-- Brings back what the ledger knows and Redis may not: replay records that are missing, and counts under caps.
-- Also with memory at its limit: no roll ends without the counts.  Whoever restores many records looks at the memory
-- before.
--
-- KEYS
--   1  generation    hash
--   2  and on: for each record its replay record (string), then for each count its caps hash
-- ARGV
--   1  generation that is open now ('' if none): during a roll this is not yet the one that the KEYS were made for
--   2  seconds that a replay record lives
--   3  number of records
--   then per record: the record
--        per count:  field, codes to add, Unix second at which the hash expires (0: never)
-- Returns {status, records set}
--   OK     every record is there (an existing one was left alone), every count was added
--   MOVED  another generation is open.  Nothing was written
-- Cost: 2 us a record

local open = redis.call('HGET', KEYS[1], 'open') or ''
local retention, records = tonumber(ARGV[2]), tonumber(ARGV[3])
if not retention or retention % 1 ~= 0 or retention < 1 or retention > 31622400
  or not records or records % 1 ~= 0 or records < 0 or records > #KEYS - 1
  or #ARGV ~= 3 + records + 3 * (#KEYS - 1 - records) then
  return redis.error_reply('BADCALL restore')
end
local at = 4 + records
for i = 2 + records, #KEYS do
  local add, expires = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local count = tonumber(redis.call('HGET', KEYS[i], ARGV[at]) or 0)
  if not count or count % 1 ~= 0 or not add or add % 1 ~= 0 or add < 0 or add > 9007199254740991
    or not expires or expires % 1 ~= 0 or expires < 0 or expires > 9007199254740991 then
    return redis.error_reply('BADCALL argument ' .. at .. ' of restore')
  end
  at = at + 3
end
if open ~= ARGV[1] then
  return {'MOVED', 0}
end

local set = 0
for i = 1, records do
  if redis.call('SET', KEYS[1 + i], ARGV[3 + i], 'EX', retention, 'NX') then
    set = set + 1
  end
end
at = 4 + records
for i = 2 + records, #KEYS do
  local add, expires = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  redis.call('HINCRBY', KEYS[i], ARGV[at], string.format('%d', add))
  if expires > 0 then
    redis.call('EXPIREAT', KEYS[i], string.format('%d', expires))
  end
  at = at + 3
end
return {'OK', set}
