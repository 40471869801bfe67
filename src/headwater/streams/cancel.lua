-- Ask for a cancel: the holder sees the flag at its next append or renewal, or when it claims.
--
-- KEYS  1 stream:{<run>}:metadata   hash, changed unless the run has ended
--       2 stream:{<run>}:chunks     list, measured
-- ARGV  1... fields to answer with
--
-- Returns {now in ms, values of the fields, length of the list}, the values nil when the run is unknown.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local status = redis.call('HGET', KEYS[1], 'status')
if status == 'queued' or status == 'running' then
  redis.call('HSET', KEYS[1], 'cancel', 1, 'updated_at', now)
end
return {now, redis.call('HMGET', KEYS[1], unpack(ARGV)), redis.call('LLEN', KEYS[2])}
