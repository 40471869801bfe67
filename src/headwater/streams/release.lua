-- Hand a run over: queued again, nobody holds it.
--
-- KEYS  1 stream:{<run>}:metadata   hash, changed
-- ARGV  1 epoch  2 attempt  3 holder
--
-- Returns 1 when it was ours to hand over, else 0.

local known = redis.call('HMGET', KEYS[1], 'epoch', 'attempt', 'holder', 'status')
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] or known[3] ~= ARGV[3] or known[4] ~= 'running' then
  return 0
end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'status', 'queued', 'holder', '', 'lease_until', 0,
  'updated_at', time[1] * 1000 + math.floor(time[2] / 1000))
return 1
