-- Extend a lease.
--
-- KEYS  1 stream:{<run>}:metadata   hash, changed
--       2 stream:{<run>}:chunks     list, lives on
--       3 stream:{<run>}:run        string, lives on
-- ARGV  1 epoch  2 attempt  3 holder  4 lease in ms  5 seconds to live
--
-- Returns `held`, `cancelled`, `fenced` or `lost`.

local known = redis.call('HMGET', KEYS[1], 'epoch', 'attempt', 'holder', 'status', 'cancel', 'chunk_count')
local epoch, attempt, holder, status = known[1], tonumber(known[2]) or 0, known[3], known[4]
local mine = tonumber(ARGV[2])

if not epoch or attempt < mine then
  return 'lost'
end
if attempt > mine then
  return 'fenced'
end
if epoch ~= ARGV[1] and holder == '' then
  return 'lost'
end
if epoch ~= ARGV[1] or holder ~= ARGV[3] or status ~= 'running' then
  return 'fenced'
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- What was written since by ordinary appends. Never less: that is how a claim sees that the list lost events.
local count = math.max(redis.call('LLEN', KEYS[2]), tonumber(known[6]) or 0)
redis.call('HSET', KEYS[1], 'lease_until', now + ARGV[4], 'chunk_count', count)
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[5])
redis.call('EXPIRE', KEYS[3], ARGV[5])
if known[5] == '1' then
  return 'cancelled'
end
return 'held'
