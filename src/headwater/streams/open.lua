-- Announce a queued run. Changes nothing when the run is known.
--
-- KEYS  1 stream:{<run>}:metadata   hash, made
--       2 stream:{<run>}:chunks     list, emptied
--       3 stream:{<run>}:run        string, the run as JSON, made
-- ARGV  1 epoch  2 attempt  3 owner_id  4 kind  5 chat_id  6 run as JSON  7 seconds to live
--
-- Returns `new`, or the status the run has already.

local status = redis.call('HGET', KEYS[1], 'status')
if status then
  return status
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- First, because a full server refuses this and, after any other write, nothing more: all or nothing.
redis.call('HSET', KEYS[1],
  'status', 'queued', 'epoch', ARGV[1], 'attempt', ARGV[2],
  'owner_id', ARGV[3], 'kind', ARGV[4], 'chat_id', ARGV[5],
  'chunk_count', 0, 'cancel', 0, 'holder', '', 'lease_until', 0,
  'created_at', now, 'updated_at', now)
-- What is left of a log without its hash cannot be trusted: its epoch is gone.
redis.call('DEL', KEYS[2])
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call('SET', KEYS[3], ARGV[6], 'EX', ARGV[7])
return 'new'
