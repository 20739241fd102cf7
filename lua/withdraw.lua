#!lua
-- Takes codes out of a window for good, and writes down in the outbox which: nobody gets them any more.
--
-- KEYS
--   1  generation    hash
--   2  totals        hash
--   3  window        list
--   4  outbox        stream
-- ARGV
--   1  generation that the KEYS were made for
--   2  and on: packed codes, each once, at least one
-- Returns {status, ...}
--   OK    then for each code 1 if it was in the window, else 0
--   LOST  generation or identity do not agree.  Nothing was written
-- Cost: 20 us a code in a window of 1,000, in proportion to where it stands

local open, replid = unpack(redis.call('HMGET', KEYS[1], 'open', 'replid'))
local present = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
if open ~= ARGV[1] or replid ~= present then
  return {'LOST'}
end
local seq, codes, withdrawn, bytes = unpack(redis.call('HMGET', KEYS[2], 'seq', 'codes', 'withdrawn', 'bytes'))
seq, codes, withdrawn, bytes = tonumber(seq or 0), tonumber(codes or 0), tonumber(withdrawn or 0), tonumber(bytes or 0)
redis.call('XLEN', KEYS[4]) -- raises on a wrong type, now rather than after the first write
if #ARGV < 2 or not seq or seq % 1 ~= 0 or not codes or codes % 1 ~= 0 or not withdrawn or withdrawn % 1 ~= 0
  or not bytes or bytes % 1 ~= 0 then
  return redis.error_reply('BADCALL withdraw')
end
local reply, there, seen = {'OK'}, {}, {}
for i = 2, #ARGV do
  if seen[ARGV[i]] or not string.match(ARGV[i], '^%x+\t%d+\t%d+\t[^%c]+\t[^%c]+$') then
    return redis.error_reply('BADCALL argument ' .. i .. ' of withdraw')
  end
  seen[ARGV[i]] = true
  if redis.call('LPOS', KEYS[3], ARGV[i]) then
    there[#there + 1] = ARGV[i]
    reply[i] = 1
  else
    reply[i] = 0
  end
end
if #there == 0 then
  return reply
end

local asides = table.concat(there, '\30')
redis.call('XADD', KEYS[4], '*', 'generation', open, 'seq', string.format('%d', seq + 1),
  'codes', string.format('%d', #there), 'bytes', string.format('%d', #asides + 1),
  'issued', '', 'asides', asides, 'why', 'withdrawn')
redis.call('HSET', KEYS[2], 'seq', string.format('%d', seq + 1))
redis.call('HINCRBY', KEYS[2], 'codes', #there)
redis.call('HINCRBY', KEYS[2], 'bytes', #asides + 1)
redis.call('HINCRBY', KEYS[2], 'withdrawn', #there)
for _, code in ipairs(there) do
  redis.call('LREM', KEYS[3], 1, code)
end
return reply
