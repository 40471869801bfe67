-- Take a run under the next attempt.
--
-- KEYS  1 stream:{<run>}:metadata   hash, made or changed
--       2 stream:{<run>}:chunks     list, emptied when a new epoch begins
--       3 stream:{<run>}:run        string, the run as JSON, set
-- ARGV  1 holder  2 attempt the caller knows of  3 epoch, should a new one begin
--       4 owner_id  5 kind  6 chat_id  7 run as JSON  8 lease in ms  9 seconds to live
--
-- Returns {'ok', epoch, attempt, events in the log, cancel}
--      or {'closed', status}  or {'held', holder, ms left}.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = redis.call('HMGET', KEYS[1],
  'status', 'epoch', 'attempt', 'holder', 'lease_until', 'cancel', 'chunk_count', 'server')
local status, epoch, attempt, holder = known[1], known[2], tonumber(known[3]) or 0, known[4]
local left = (tonumber(known[5]) or 0) - now

if status == 'done' or status == 'failed' or status == 'cancelled' then
  return {'closed', status}
end
if left > 0 and holder ~= ARGV[1] then
  return {'held', holder, left}
end

-- A server that restarted since the last claim may have lost the newest events (a snapshot, a
-- replica that lagged), and their seqs would be given out a second time. The last holder would
-- have written them again; it is gone, so only a new epoch tells readers the truth.
local info = redis.pcall('INFO', 'server')
local server = type(info) == 'string' and string.match(info, 'run_id:(%x+)') or ''
local restarted = known[8] and known[8] ~= server
local count = redis.call('LLEN', KEYS[2])
-- `chunk_count` may lag behind, but a list that is shorter has lost events.
local anew = not epoch or restarted or count < (tonumber(known[7]) or math.huge)
if anew then
  epoch, count = ARGV[3], 0
end

-- The holder itself, whose reply was lost: nobody has worked or died in between, so it is the same attempt.
local again = left > 0 and not anew and attempt > tonumber(ARGV[2])
if not again then
  attempt = math.max(attempt, tonumber(ARGV[2])) + 1
end
-- First, because a full server refuses this and, after any other write, nothing more: all or nothing.
redis.call('HSET', KEYS[1],
  'status', 'running', 'epoch', epoch, 'attempt', attempt, 'holder', ARGV[1], 'lease_until', now + ARGV[8],
  'owner_id', ARGV[4], 'kind', ARGV[5], 'chat_id', ARGV[6], 'chunk_count', count, 'server', server,
  'updated_at', now)
if anew then
  redis.call('DEL', KEYS[2])
end
redis.call('HSETNX', KEYS[1], 'created_at', now)
redis.call('HSETNX', KEYS[1], 'started_at', now)
redis.call('HSETNX', KEYS[1], 'cancel', 0)
redis.call('SET', KEYS[3], ARGV[7], 'EX', ARGV[9])
redis.call('EXPIRE', KEYS[1], ARGV[9])
redis.call('EXPIRE', KEYS[2], ARGV[9])
return {'ok', epoch, attempt, count, tonumber(known[6]) or 0}
