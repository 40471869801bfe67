-- Take one of an owner's places, or wait for one.
--
-- KEYS  1 …:taken     zset, run ids; score: when a place counts as given back, in ms
--       2 …:waiting   zset, run ids; score: the order of their turns
-- ARGV  1 run  2 its order  3 places there are  4 ms it may keep the place  5 seconds to live
--
-- Returns how many places others had taken, or -1: it waits.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local mine = redis.call('ZSCORE', KEYS[1], ARGV[1])
local taken = redis.call('ZCARD', KEYS[1]) - (mine and 1 or 0)
if mine or taken < tonumber(ARGV[3]) then
  redis.call('ZADD', KEYS[1], now + ARGV[4], ARGV[1])
  redis.call('EXPIRE', KEYS[1], ARGV[5])
  redis.call('ZREM', KEYS[2], ARGV[1])
  return taken
end
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[5])
return -1
