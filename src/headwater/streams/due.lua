-- Runs to look at.
--
-- KEYS  1 headwater:due   zset, read
-- ARGV  1 how many to pass over  2 how many at most
--
-- Returns {now in ms, run ids, longest first}.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return {now, redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', ARGV[1], ARGV[2])}
