-- Say when to look whether somebody holds a run. The score is a hint: `due` asks the run's own hash.
--
-- KEYS  1 headwater:due   zset, in a slot of its own, hence a script of its own
-- ARGV  1 run id  2 ms from now  3 seconds to live
--       4 NX to leave a known run where it is, LT to let it only come sooner, or ''

local time = redis.call('TIME')
local at = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2]
if ARGV[4] ~= '' then
  redis.call('ZADD', KEYS[1], ARGV[4], at, ARGV[1])
else
  redis.call('ZADD', KEYS[1], at, ARGV[1])
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
