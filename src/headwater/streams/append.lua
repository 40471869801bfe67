-- Write events at their place, tell the followers, extend the lease. All or nothing.
--
-- KEYS  1 stream:{<run>}:metadata   hash, changed
--       2 stream:{<run>}:chunks     list, grows
--       3 stream:{<run>}:run        string, removed by a terminal event: nobody takes over an ended run
-- ARGV  1 channel  2 epoch  3 attempt  4 holder  5 seq of the first event
--       6 lease in ms  7 seconds to live while it runs  8 seconds to live once it ended
--       9 status that the last event ends the run with, or ''  10... events as JSON
--
-- Returns {'ok', events in the log, cancel}, {'fenced'}, {'closed'} or {'lost'}.

local BEFORE = 9
local n = #ARGV - BEFORE
local known = redis.call('HMGET', KEYS[1], 'epoch', 'attempt', 'holder', 'status', 'cancel', 'packed', 'chunk_count')
local epoch, attempt, holder, status = known[1], tonumber(known[2]) or 0, known[3], known[4]
local mine = tonumber(ARGV[3])

if not epoch or attempt < mine then
  return {'lost'}
end
if attempt > mine then
  return {'fenced'}
end
if epoch ~= ARGV[2] and holder == '' then
  -- Forgotten and announced again, but claimed by nobody: the one who still holds it may restore it.
  return {'lost'}
end
if epoch ~= ARGV[2] or holder ~= ARGV[4] then
  return {'fenced'}
end

-- `there` of our events are in the log already: the reply to an earlier append was lost.
local first = tonumber(ARGV[5])
local length = known[6] and tonumber(known[7]) or redis.call('LLEN', KEYS[2])
local there = length - first + 1
local same = math.min(there, n)
-- A packed log cannot be compared; but it has ended, and nobody but us could have ended it.
if same > 0 and not known[6] and redis.call('LINDEX', KEYS[2], first + same - 2) ~= ARGV[BEFORE + same] then
  return {'fenced'}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if there >= n then
  if status == 'running' then
    redis.call('HSET', KEYS[1], 'lease_until', now + ARGV[6])
  end
  return {'ok', first + there - 1, tonumber(known[5]) or 0}
end
if status == 'done' or status == 'failed' or status == 'cancelled' then
  return {'closed'}
end
if there < 0 then
  return {'lost'}
end

local from = BEFORE + 1 + there
-- In slices: Lua's stack holds 8,000 values.
for i = from, #ARGV, 4000 do
  redis.call('RPUSH', KEYS[2], unpack(ARGV, i, math.min(i + 3999, #ARGV)))
end
local count = first + n - 1
if ARGV[9] == '' then
  redis.call('HSET', KEYS[1], 'chunk_count', count, 'updated_at', now, 'lease_until', now + ARGV[6])
  -- Later on it is the renewal of the lease that lets them live on: once a second, not once a token.
  if length == 0 then
    for i = 1, 3 do
      redis.call('EXPIRE', KEYS[i], ARGV[7])
    end
  end
else
  redis.call('HSET', KEYS[1], 'chunk_count', count, 'updated_at', now, 'lease_until', 0,
    'status', ARGV[9], 'ended_at', now)
  redis.call('EXPIRE', KEYS[1], ARGV[8])
  redis.call('EXPIRE', KEYS[2], ARGV[8])
  redis.call('DEL', KEYS[3])
end
redis.call('PUBLISH', ARGV[1],
  string.format('%s %d\n', ARGV[2], first + there) .. table.concat(ARGV, '\n', from, #ARGV))
return {'ok', count, tonumber(known[5]) or 0}
