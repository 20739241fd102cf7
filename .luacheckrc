-- The scripts run inside Redis or Valkey: Lua 5.1 and these names, nothing else.
std = "lua51"
globals = { "redis", "KEYS", "ARGV", "cjson", "cmsgpack" }
max_line_length = 120
