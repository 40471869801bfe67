-- Write a log that was lost again, under the epoch and attempt of the one who still holds the run.
--
-- KEYS  1 stream:{<run>}:metadata   hash, made or changed
--       2 stream:{<run>}:chunks     list, completed; replaced when it is of another epoch or attempt
--       3 stream:{<run>}:run        string, set; removed by a terminal event
-- ARGV  1 channel  2 epoch  3 attempt  4 holder
--       5 lease in ms  6 seconds to live while it runs  7 seconds to live once it ended
--       8 status that the last event ends the run with, or ''
--       9 owner_id  10 kind  11 chat_id  12 run as JSON  13... every event from seq 1 as JSON
--
-- Returns {'ok', events in the log, cancel}, {'fenced'} or {'closed'}.

local BEFORE = 12
local n = #ARGV - BEFORE
local known = redis.call('HMGET', KEYS[1], 'epoch', 'attempt', 'holder', 'status', 'cancel', 'packed', 'chunk_count')
local epoch, attempt, holder, status = known[1], tonumber(known[2]) or 0, known[3], known[4]
local mine = tonumber(ARGV[3])
local ours = epoch == ARGV[2] and holder == ARGV[4]

if attempt > mine then
  return {'fenced'}
end
-- The same attempt in other hands: claimed after the loss. With no holder it was only announced again,
-- unless the epoch is ours: then we gave it up ourselves.
if epoch and attempt == mine and not ours and (holder ~= '' or epoch == ARGV[2]) then
  return {'fenced'}
end

local count = known[6] and tonumber(known[7]) or redis.call('LLEN', KEYS[2])
if status == 'done' or status == 'failed' or status == 'cancelled' then
  if ours and count >= n then
    return {'ok', count, tonumber(known[5]) or 0}
  end
  return {'closed'}
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- First, because a full server refuses this and, after any other write, nothing more: all or nothing.
redis.call('HSET', KEYS[1], 'updated_at', now)
if not ours or attempt ~= mine then
  -- Of another epoch; or a server came back as it was before our claim, and a holder of that time has gone on.
  redis.call('DEL', KEYS[2])
  count = 0
end
for i = BEFORE + 1 + count, #ARGV, 4000 do
  redis.call('RPUSH', KEYS[2], unpack(ARGV, i, math.min(i + 3999, #ARGV)))
end
count = math.max(count, n)
local info = redis.pcall('INFO', 'server')
redis.call('HSET', KEYS[1],
  'status', 'running', 'epoch', ARGV[2], 'attempt', mine, 'holder', ARGV[4], 'lease_until', now + ARGV[5],
  'owner_id', ARGV[9], 'kind', ARGV[10], 'chat_id', ARGV[11], 'chunk_count', count, 'updated_at', now,
  'server', type(info) == 'string' and string.match(info, 'run_id:(%x+)') or '')
redis.call('HSETNX', KEYS[1], 'created_at', now)
redis.call('HSETNX', KEYS[1], 'started_at', now)
redis.call('HSETNX', KEYS[1], 'cancel', 0)
local live = ARGV[6]
if ARGV[8] == '' then
  redis.call('SET', KEYS[3], ARGV[12], 'EX', live)
else
  redis.call('HSET', KEYS[1], 'status', ARGV[8], 'ended_at', now, 'lease_until', 0)
  redis.call('DEL', KEYS[3])
  live = ARGV[7]
end
redis.call('EXPIRE', KEYS[1], live)
redis.call('EXPIRE', KEYS[2], live)
-- Without events: a whole log may be large, and every reader is somewhere else in it.
redis.call('PUBLISH', ARGV[1], string.format('%s %d\n', ARGV[2], count + 1))
return {'ok', count, tonumber(known[5]) or 0}
