-- The ordinary append: it goes on where the log ends, ends nothing, and nobody asked for a cancel. Anything else changes
-- nothing and is for append.lua, which finds out what it is. Each value read, passed, written or returned here is a share
-- of what a server can carry; so lease, times and `chunk_count` are left to append.lua and renew.lua, once a second.
--
-- KEYS  1 stream:{<run>}:metadata   hash, changed by the first event
--       2 stream:{<run>}:chunks     list, grows
-- ARGV  1 epoch  2 attempt  3 holder  4 seq of the first event  5... events as JSON
--
-- Returns the events in the log, or nil.

local known = redis.call('HMGET', KEYS[1], 'status', 'epoch', 'attempt', 'holder', 'cancel')
if known[1] ~= 'running' or known[2] ~= ARGV[1] or known[3] ~= ARGV[2] or known[4] ~= ARGV[3] or known[5] ~= '0' then
  return false
end
local n = #ARGV - 4
local count = redis.call('RPUSH', KEYS[2], unpack(ARGV, 5))
if count ~= ARGV[4] + n - 1 then
  -- Nobody has seen them: cheaper than to ask for the length before every append.
  redis.call('LTRIM', KEYS[2], 0, -1 - n)
  return false
end
if count == n then
  redis.call('HSET', KEYS[1], 'chunk_count', count)
  local left = redis.call('PTTL', KEYS[1])
  -- Of a hash that was made to stay it is -1, which deletes what is said to expire then.
  if left > 0 then
    redis.call('PEXPIRE', KEYS[2], left)
  end
end
-- The channel is the key without `:chunks`.
redis.call('PUBLISH', string.sub(KEYS[2], 1, -8), ARGV[1] .. ' ' .. ARGV[4] .. '\n' .. table.concat(ARGV, '\n', 5))
return count
