-- Give a place back, and learn whose turn it is.
--
-- KEYS  1 …:taken     zset, changed
--       2 …:waiting   zset, changed
-- ARGV  1 run  2 places there are
--
-- Returns the ids of the runs that waited longest, one for each place that is free.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local free = ARGV[2] - redis.call('ZCARD', KEYS[1])
if free <= 0 then
  return {}
end
local popped, ids = redis.call('ZPOPMIN', KEYS[2], free), {}
for i = 1, #popped, 2 do
  ids[#ids + 1] = popped[i]
end
return ids
