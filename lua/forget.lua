#!lua flags=allow-oom
-- Unlinks keys of a generation that was left.  The address may lead to another server by now, one from before a
-- failover, where that generation is the open one: so it is decided here and not by who asks.
--
-- KEYS
--   1  generation    hash
--   2  outbox        stream
--   3  and on: the keys to unlink, all of the generation of this outbox
-- ARGV
--   1  generation to forget
-- Returns {status, keys unlinked}
--   OK    those that were there are gone
--   OPEN  this generation is open here.  Nothing was written
--   HELD  its outbox holds what is not in the ledger.  Nothing was written
-- Cost: 1 us a key

if not string.match(ARGV[1], '^%d+$') or #KEYS < 3 then
  return redis.error_reply('BADCALL forget')
end
if redis.call('HGET', KEYS[1], 'open') == ARGV[1] then
  return {'OPEN', 0}
end
if redis.call('XLEN', KEYS[2]) > 0 then
  return {'HELD', 0}
end
local unlinked = redis.call('UNLINK', unpack(KEYS, 3))
return {'OK', unlinked}
