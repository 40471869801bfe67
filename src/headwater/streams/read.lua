-- A page of a log, at one moment. A script rather than MULTI, which a server that is full refuses even for reads.
--
-- KEYS  1 stream:{<run>}:metadata   hash, read
--       2 stream:{<run>}:chunks     list, read
-- ARGV  1 seq after which the page begins  2 events at most  3 bytes after which it ends
--
-- Returns {epoch, status, events there should be, events there are, events as JSON}; the epoch nil without a log.

local known = redis.call('HMGET', KEYS[1], 'epoch', 'status', 'chunk_count')
local after = tonumber(ARGV[1])
local events = redis.call('LRANGE', KEYS[2], after, after + tonumber(ARGV[2]) - 1)
local bytes = 0
for i = 1, #events do
  bytes = bytes + #events[i]
  if bytes >= tonumber(ARGV[3]) then
    -- An answer ends at the first nil.
    events[i + 1] = nil
    break
  end
end
return {known[1], known[2], known[3], redis.call('LLEN', KEYS[2]), events}
