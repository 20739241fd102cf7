#!lua flags=no-writes
-- Asks whether this user may run every command that the other scripts use: a right that is missing half-way
-- through a script destroys a code.
--
-- KEYS (none)
-- ARGV
--   1  and on: commands, each as one word
-- Returns {status, ...}
--   OK       every command is allowed
--   REFUSED  then the commands that are not
-- Cost: 1 us a command

local refused = {'REFUSED'}
for i = 1, #ARGV do
  if ARGV[i] == '' then
    return redis.error_reply('BADCALL rights')
  end
  if redis.acl_check_cmd and not redis.acl_check_cmd(ARGV[i], '{0}:fence') then
    refused[#refused + 1] = ARGV[i]
  end
end
return #refused > 1 and refused or {'OK'}
