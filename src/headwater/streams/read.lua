-- A page of a log, at one moment. A script rather than MULTI, which a server that is full refuses even for reads.
--
-- KEYS  1 stream:{<run>}:metadata   hash, read
--       2 stream:{<run>}:chunks     list, read
-- ARGV  1 seq after which the page begins  2 events at most
--
-- Returns {epoch, status, events there should be, events there are, events as JSON}; the epoch nil without a log.

local known = redis.call('HMGET', KEYS[1], 'epoch', 'status', 'chunk_count')
local after = tonumber(ARGV[1])
local events = redis.call('LRANGE', KEYS[2], after, after + tonumber(ARGV[2]) - 1)
return {known[1], known[2], known[3], redis.call('LLEN', KEYS[2]), events}
