-- Put the packed form of a log in its place. Only that of a run that has ended, and only once.
--
-- KEYS  1 stream:{<run>}:metadata   hash, gets `packed`
--       2 stream:{<run>}:chunks     list, replaced; lives as long as it would have
-- ARGV  1 epoch  2 events that were packed  3 first seq of each frame, as 1,812,…  4... frames
--
-- Returns 1, or 0 when the log is not as it was.

local known = redis.call('HMGET', KEYS[1], 'epoch', 'status', 'chunk_count', 'packed')
local status = known[2]
if known[1] ~= ARGV[1] or known[3] ~= ARGV[2] or known[4]
  or not (status == 'done' or status == 'failed' or status == 'cancelled')
  or redis.call('LLEN', KEYS[2]) ~= tonumber(ARGV[2]) then
  return 0
end
local left = redis.call('PTTL', KEYS[2])
-- First, because a full server refuses this and, after any other write, nothing more: all or nothing.
redis.call('HSET', KEYS[1], 'packed', ARGV[3])
redis.call('DEL', KEYS[2])
redis.call('RPUSH', KEYS[2], unpack(ARGV, 4))
if left > 0 then
  redis.call('PEXPIRE', KEYS[2], left)
end
return 1
