#!lua
-- Gives codes to a batch of requests, or says for each why not.  The whole batch is read, then decided, then
-- written: a failed command does not undo earlier writes, so nothing that can be refused comes after the first.
--
-- KEYS
--   1  generation    hash
--   2  fence         string
--   3  totals        hash
--   4  outbox        stream
--   5  demand        sorted set
--   6  and on: for each pool its window (list) and its pool hash; for each counter the caps hash of this period
--      and of the next (a total: the same key twice); for each rate limit its state (string: Unix microseconds from
--      which on the whole burst may be issued again); for each request its replay record (string)
-- ARGV
--   1  generation that the KEYS were made for
--   2  catalogue version that the requests were routed by
--   3  nonce, returned
--   4  most codes that the outbox may hold
--   5  most bytes that it may hold
--   6  most codes to set aside in this call
--   7  seconds that a replay record lives
--   8  number of pools    9  number of counters    10  number of rate limits    11  number of plans
--   12  number of requests    13  number of traces: 0, or that of the requests
--   then per pool:     id, least life in seconds
--        per counter:  start, middle, end (Unix seconds): the first hash counts in [start, middle), the second
--                      in [middle, end); a total has start 0 and middle = end
--        per limit:    distributor, vouchers a second, vouchers at once (at most an hour's)
--        per plan:     number of candidates; for each: pool index, from, until (0: open), rule (opaque text),
--                      number of caps; for each: counter index, whose count (c: the campaign's, d: the
--                      distributor's, t: the terminal's), limit
--        per request:  plan index (0: no candidate), quantity, 1 if its key was looked up in the ledger, else 0, and
--                      the distributor, joined by ':'; payload, which begins with the terminal and a tab; head (api,
--                      distributor, client, key: four lines)
--        per trace:    the traceparent of a request, '' if it has none; goes into the outbox as it is
-- Returns {status, nonce, open generation, now, ...}
--   OK     then for each request a status and its detail:
--            ISSUED   the record
--            REPLAY   the record that was there
--            REUSED   '' : the record that was there has another payload
--            LOOKUP   '' : no record, but records are being restored: look in the ledger, then ask again
--            LIMITED  microseconds until as many may be issued to this distributor, and how many may be now; said
--                     before any campaign is looked at, never of a replay; only what is issued counts
--            REFILL   pool index: its window is short and not known to be exhausted
--            BACKLOG  codes or bytes: would issue, but the outbox is at this bound
--            NONE     for each candidate, comma-separated: before, after, capped, exhausted
--   STALE  then the fence: it is above the catalogue version.  Nothing was written
--   LOST   generation or identity do not agree.  Nothing was written
--   CLOCK  the periods sent do not hold now.  Nothing was written
-- Cost: 5 to 7 us a voucher from batches of 16 up

local bad
local function integer(position, least)
  local value = tonumber(ARGV[position])
  if not value or value % 1 ~= 0 or value < least or value > 9007199254740991 then
    bad = bad or position
    return least
  end
  return value
end

-- read: who am I, who asks -------------------------------------------------------------------------------------
local generation_key, fence_key, totals_key, outbox_key, demand_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local nonce = ARGV[3]
local time = redis.call('TIME')
local now = tonumber(time[1])

local open, replid, restoring = unpack(redis.call('HMGET', generation_key, 'open', 'replid', 'restoring'))
local present = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
local fence = tonumber(redis.call('GET', fence_key) or nil)
if open ~= ARGV[1] or replid ~= present or not fence then
  return {'LOST', nonce, open or '', now}
end
local version = integer(2, 0)
if fence > version then
  return {'STALE', nonce, open, now, string.format('%d', fence)}
end

-- read: arguments ------------------------------------------------------------------------------------------------
local outbox_max, bytes_max, aside_left, retention = integer(4, 0), integer(5, 0), integer(6, 0), integer(7, 1)
local pool_count, counter_count, limit_count = integer(8, 0), integer(9, 0), integer(10, 0)
local plan_count, request_count, trace_count = integer(11, 0), integer(12, 0), integer(13, 0)
if bad or retention > 31622400 or (trace_count > 0 and trace_count ~= request_count)
  or #KEYS ~= 5 + 2 * pool_count + 2 * counter_count + limit_count + request_count then
  return redis.error_reply('BADCALL argument ' .. (bad or 0) .. ' of issue')
end
local at = 14 -- the argument to read next
local key_at = 6

local pools = {}
for i = 1, pool_count do
  pools[i] = {index = i, id = ARGV[at], least_life = integer(at + 1, 0), window = KEYS[key_at], hash = KEYS[key_at + 1]}
  at, key_at = at + 2, key_at + 2
end

local counters = {}
for i = 1, counter_count do
  local start, middle, stop = integer(at, 0), integer(at + 1, 0), integer(at + 2, 0)
  if bad or (start > 0 and (middle <= start or stop < middle or stop - start > 31622400)) then
    return redis.error_reply('BADCALL argument ' .. (bad or at) .. ' of issue')
  end
  if now < start or now >= stop then
    return {'CLOCK', nonce, open, now}
  end
  local counter = {used = {}, fields = {}, raised = {}}
  if now < middle then
    counter.key, counter.expires = KEYS[key_at], start > 0 and 2 * middle - start
  else
    counter.key, counter.expires = KEYS[key_at + 1], start > 0 and 2 * stop - middle
  end
  counters[i] = counter
  at, key_at = at + 3, key_at + 2
end

local limits, limit_of, limits_at = {}, {}, key_at -- limit_of: by distributor
for i = 1, limit_count do
  local limit = {key = KEYS[key_at], rate = integer(at + 1, 1), burst = integer(at + 2, 1)}
  if bad or limit.burst > 3600 * limit.rate then -- else its state would live for too long
    return redis.error_reply('BADCALL argument ' .. (bad or at) .. ' of issue')
  end
  limits[i], limit_of[ARGV[at]] = limit, limit
  at, key_at = at + 3, key_at + 1
end

local plans = {['0'] = {}} -- by their index as it is written in a request: nothing to convert for each
for i = 1, plan_count do
  local plan = {}
  local candidate_count = integer(at, 0)
  if bad then -- here, not after the loop: nothing else bounds the number of plans
    return redis.error_reply('BADCALL argument ' .. bad .. ' of issue')
  end
  at = at + 1
  for c = 1, candidate_count do
    local candidate = {
      pool = pools[integer(at, 1)], from = integer(at + 1, 0), till = integer(at + 2, 0), rule = ARGV[at + 3],
    }
    local cap_count = integer(at + 4, 0)
    at = at + 5
    if bad or not candidate.pool then
      return redis.error_reply('BADCALL argument ' .. (bad or at) .. ' of issue')
    end
    for k = 1, cap_count do
      local counter, holder, limit = counters[integer(at, 1)], ARGV[at + 1], integer(at + 2, 0)
      if bad or not counter or not (holder == 'c' or holder == 'd' or holder == 't') then
        return redis.error_reply('BADCALL argument ' .. (bad or at) .. ' of issue')
      end
      candidate[k] = {counter = counter, holder = holder, limit = limit}
      at = at + 3
    end
    plan[c] = candidate
  end
  plans[string.format('%d', i)] = plan
end

if #ARGV ~= at - 1 + 3 * request_count + trace_count then
  return redis.error_reply('BADCALL number of arguments of issue')
end
local traces_at = at + 3 * request_count
local shapes = {} -- shapes: most requests of a batch ask for the same, so each text is read once
for i = 1, request_count do
  local text = ARGV[at + 3 * (i - 1)]
  local shape = shapes[text]
  if not shape then
    local plan, quantity, looked_up, distributor = string.match(text, '^(%d+):(%d+):([01]):([^%c]+)$')
    shape = {plan = plans[plan or ''], quantity = tonumber(quantity or 0), looked_up = looked_up == '1'}
    shape.limit = limit_of[distributor]
    shape.c, shape.d, shape.t = 'c', 'd:' .. (distributor or ''), 't:' .. (distributor or '') .. ':'
    if not shape.plan or shape.quantity < 1 or shape.quantity > 1000000 then
      return redis.error_reply('BADCALL argument ' .. at + 3 * (i - 1) .. ' of issue')
    end
    shapes[text] = shape
  end
end

-- read: state ----------------------------------------------------------------------------------------------------
local broken -- what no writer of ours can have left in Redis
local function count_of(value, key)
  local count = tonumber(value or 0)
  if not count or count % 1 ~= 0 or count > 9007199254740991 then
    broken = key
    return 0
  end
  return count
end

local totals = redis.call('HMGET', totals_key, 'seq', 'codes', 'popped', 'set_aside', 'bytes')
for i = 1, 5 do
  totals[i] = count_of(totals[i], totals_key)
end
local seq, room = totals[1], outbox_max - totals[2] -- room: codes that the outbox may still take
-- Without codes it is empty, so what a worker that does not count bytes has left of them is forgotten then.
local bytes = totals[2] > 0 and totals[5] or 0
local room_bytes = bytes_max - bytes
redis.call('ZCARD', demand_key) -- raises on a wrong type, now rather than after the first write

for _, pool in ipairs(pools) do
  pool.length = redis.call('LLEN', pool.window)
  local stock, exhausted, low = unpack(redis.call('HMGET', pool.hash, 'stock', 'exhausted', 'low'))
  pool.exhausted = stock and stock == exhausted
  pool.low = count_of(low, pool.hash)
  pool.loaded, pool.taken, pool.usable, pool.codes, pool.asides = 0, 0, 0, {}, {}
  pool.asked = 0 -- codes that those want who come to it first
end

-- What a distributor has had is counted in voucher-microseconds (GCRA): a voucher is a million of them, a microsecond
-- takes away as many as the rate, so nothing is ever rounded but the state, and that never in its favour.
local now_us = now * 1000000 + tonumber(time[2])
local states = limit_count > 0 and redis.call('MGET', unpack(KEYS, limits_at, limits_at + limit_count - 1)) or {}
for i, limit in ipairs(limits) do
  local since = count_of(states[i], limit.key) - now_us
  limit.most = limit.burst * 1000000
  limit.had = math.min(math.max(since, 0) * limit.rate, limit.most) -- more only after the limit or the clock went back
end

local replays = request_count > 0 and redis.call('MGET', unpack(KEYS, key_at)) or {}

local function field_of(cap, shape, terminal)
  return cap.holder == 't' and shape.t .. terminal or shape[cap.holder]
end

-- what the caps that may be looked at have counted: one call a counter
local terminals = {}
for i = 1, request_count do
  if not replays[i] then
    local first = at + 3 * (i - 1)
    local terminal, shape = string.match(ARGV[first + 1], '^[^\t]*'), shapes[ARGV[first]]
    local plan = shape.plan
    terminals[i] = terminal
    if plan[1] then
      plan[1].pool.asked = plan[1].pool.asked + shape.quantity
    end
    for c = 1, #plan do
      local candidate = plan[c]
      for k = 1, #candidate do
        local counter, field = candidate[k].counter, field_of(candidate[k], shape, terminal)
        if not counter.used[field] then
          counter.used[field] = 0
          counter.fields[#counter.fields + 1] = field
        end
      end
    end
  end
end
for _, counter in ipairs(counters) do
  if #counter.fields > 0 then
    local counts = redis.call('HMGET', counter.key, unpack(counter.fields))
    for i, field in ipairs(counter.fields) do
      counter.used[field] = count_of(counts[i], counter.key)
      counter.lives = counter.lives or counts[i]
    end
  end
end

-- Looks ahead in a window until `count` codes beyond those taken are at hand; steps over codes with too little life.
local function at_hand(pool, count)
  local codes = pool.codes
  while pool.usable - pool.taken < count do
    if pool.blocked or pool.loaded >= pool.length then
      return false
    end
    local most = math.max(pool.asked, 2 * pool.loaded, count)
    local ahead = redis.call('LRANGE', pool.window, pool.loaded, pool.loaded + most - 1)
    if #ahead == 0 then
      return false
    end
    for i = 1, #ahead do
      -- codes of one lot begin alike, with their expiry, which is looked at once
      local begins = string.sub(ahead[i], 1, 11)
      if begins ~= pool.begins then
        pool.begins, pool.expires = begins, tonumber(string.match(ahead[i], '^(%x+)\t') or 'none', 16)
        if not pool.expires then
          broken = pool.window
          return false
        end
      end
      if pool.expires > now + pool.least_life then
        pool.usable = pool.usable + 1
        codes[pool.usable] = ahead[i]
      elseif aside_left > 0 and room > 0 and room_bytes > #ahead[i] then
        aside_left, room, room_bytes = aside_left - 1, room - 1, room_bytes - #ahead[i] - 1
        pool.asides[#pool.asides + 1] = ahead[i]
      else
        pool.blocked = #ahead[i] -- the next call sets more aside; until then nothing behind this code is at hand
        break
      end
      pool.loaded = pool.loaded + 1
    end
  end
  return true
end

-- decide ---------------------------------------------------------------------------------------------------------
local reply = {'OK', nonce, open, now}
local issued = {} -- records by their keys
local records, record_keys, entries = {}, {}, {} -- in the order of their codes; entries: as they go into the outbox
local traces = {} -- of the records, if there are any
local records_made, codes_issued = 0, 0
local fields = {} -- of the caps of the candidate that is looked at
local issued_at = '\n' .. string.format('%x', now) .. '\n'

local function decide(i)
  local first = at + 3 * (i - 1)
  local shape, payload, key = shapes[ARGV[first]], ARGV[first + 1], KEYS[key_at + i - 1]
  local record = issued[key] or replays[i]
  if record then
    if string.sub(record, 2, #payload + 2) == payload .. '\n' then
      return 'REPLAY', record
    end
    return 'REUSED', ''
  end
  if restoring and not shape.looked_up then
    return 'LOOKUP', ''
  end
  local plan, quantity, terminal, stops = shape.plan, shape.quantity, terminals[i], nil
  local limit = shape.limit
  if limit then
    local over = limit.had + quantity * 1000000 - limit.most
    if over > 0 then
      return 'LIMITED', string.format('%d,%d', math.ceil(over / limit.rate),
        math.floor((limit.most - limit.had) / 1000000))
    end
  end
  for c = 1, #plan do
    local candidate = plan[c]
    local pool, take, stop = candidate.pool, quantity, nil
    if now < candidate.from then
      stop = 'before'
    elseif candidate.till > 0 and now >= candidate.till then
      stop = 'after'
    else
      for k = 1, #candidate do
        local cap = candidate[k]
        local field = field_of(cap, shape, terminal)
        local left = cap.limit - cap.counter.used[field]
        fields[k] = field
        if left < take then
          take = left
        end
      end
      if take <= 0 then
        stop = 'capped'
      elseif pool.exhausted and not at_hand(pool, quantity) and not pool.blocked then
        stop = 'exhausted'
      elseif not at_hand(pool, take) then
        if pool.blocked and (room <= 0 or room_bytes <= pool.blocked) then
          return 'BACKLOG', room <= 0 and 'codes' or 'bytes'
        end
        pool.wanted = true
        return 'REFILL', pool.index
      end
    end
    if not stop then
      if take > room then
        return 'BACKLOG', 'codes'
      end
      local codes = pool.codes[pool.taken + 1]
      if take > 1 then
        codes = table.concat(pool.codes, '\n', pool.taken + 1, pool.taken + take)
      end
      record = '2' .. payload .. issued_at .. candidate.rule .. '\n' .. codes
      local entry = ARGV[first + 2] .. '\n' .. record
      local weight, trace = #entry, nil
      if trace_count > 0 then
        trace = ARGV[traces_at + i - 1]
        weight = weight + #trace + 1
      end
      if weight >= room_bytes then
        return 'BACKLOG', 'bytes'
      end
      room, room_bytes = room - take, room_bytes - weight - 1 -- 1: what stands between two
      if limit then
        limit.had, limit.raised = limit.had + take * 1000000, true
      end
      for k = 1, #candidate do
        local counter, field = candidate[k].counter, fields[k]
        -- two caps may share a counter (distributor and day, say), never a field: one rule, one limit
        counter.used[field] = counter.used[field] + take
        counter.raised[field] = true
      end
      pool.taken = pool.taken + take
      codes_issued = codes_issued + take
      issued[key] = record
      records_made = records_made + 1
      records[records_made], record_keys[records_made], entries[records_made] = record, key, entry
      traces[records_made] = trace
      return 'ISSUED', record
    end
    stops = stops and stops .. ',' .. stop or stop
  end
  return 'NONE', stops or ''
end

for i = 1, request_count do
  reply[3 + 2 * i], reply[4 + 2 * i] = decide(i)
end
if broken then
  return redis.error_reply('BROKEN ' .. broken)
end

-- write ----------------------------------------------------------------------------------------------------------
local asides = {}
for _, pool in ipairs(pools) do
  for _, code in ipairs(pool.asides) do
    asides[#asides + 1] = code
  end
end

local leaving, entered = codes_issued + #asides, bytes_max - bytes - room_bytes
if leaving > 0 then
  redis.call('XADD', outbox_key, '*', 'generation', open, 'seq', string.format('%d', seq + 1),
    'codes', string.format('%d', leaving), 'bytes', string.format('%d', entered),
    'issued', table.concat(entries, '\30'), 'asides', table.concat(asides, '\30'),
    unpack(#traces > 0 and {'traces', table.concat(traces, '\30')} or {}))
  local seconds = string.format('%d', retention)
  for i = 1, records_made do
    redis.call('SET', record_keys[i], records[i], 'EX', seconds)
  end
  redis.call('HSET', totals_key, 'seq', string.format('%d', seq + 1),
    'codes', string.format('%d', totals[2] + leaving), 'bytes', string.format('%d', bytes + entered),
    'popped', string.format('%d', totals[3] + codes_issued),
    'set_aside', string.format('%d', totals[4] + #asides))
  for _, limit in ipairs(limits) do
    if limit.raised then
      local left = math.ceil(limit.had / limit.rate)
      redis.call('SET', limit.key, string.format('%d', now_us + left),
        'EX', string.format('%d', math.ceil(left / 1000000) + 1)) -- + 1: the server counts from when the call began
    end
  end
  for _, counter in ipairs(counters) do
    local counts = {}
    for field in pairs(counter.raised) do
      counts[#counts + 1] = field
      counts[#counts + 1] = string.format('%d', counter.used[field])
    end
    if #counts > 0 then
      redis.call('HSET', counter.key, unpack(counts))
      if counter.expires and not counter.lives then -- else it got its end with its first count
        redis.call('EXPIREAT', counter.key, counter.expires)
      end
    end
  end
end

for _, pool in ipairs(pools) do
  for _, code in ipairs(pool.asides) do
    redis.call('LREM', pool.window, 1, code)
  end
  if pool.taken > 0 then
    redis.call('LPOP', pool.window, pool.taken)
  end
  local left = pool.length - pool.taken - #pool.asides
  if not pool.exhausted and (pool.wanted or left < pool.low) then
    redis.call('ZADD', demand_key, left, pool.id)
  end
end
return reply
