-- A page of a log, at one moment. A script rather than MULTI, which a server that is full refuses even for reads.
--
-- KEYS  1 stream:{<run>}:metadata   hash, read
--       2 stream:{<run>}:chunks     list, read
-- ARGV  1 seq after which the page begins  2 events at most  3 bytes after which it ends
--
-- Returns {epoch, status, events there should be, events there are, events as JSON, 0}; the epoch nil without a log.
-- Of a packed log the fifth is one frame, and the sixth the seq of its first event.

local known = redis.call('HMGET', KEYS[1], 'epoch', 'status', 'chunk_count', 'packed')
local after = tonumber(ARGV[1])
local length = redis.call('LLEN', KEYS[2])

if known[4] then
  local frames, first, place = 0, 0, 0
  for seq in string.gmatch(known[4], '%d+') do
    frames = frames + 1
    if tonumber(seq) <= after + 1 then
      first, place = tonumber(seq), frames
    end
  end
  if frames ~= length then
    return {known[1], known[2], known[3], 0, {}, 0}
  end
  if after >= tonumber(known[3]) then
    return {known[1], known[2], known[3], tonumber(known[3]), {}, 0}
  end
  return {known[1], known[2], known[3], tonumber(known[3]), {redis.call('LINDEX', KEYS[2], place - 1)}, first}
end

local last = after + tonumber(ARGV[2])
local events, bytes, step = {}, 0, 8
-- In steps that grow: a thousand large events must not be copied to return the first two.
while after < last and bytes < tonumber(ARGV[3]) do
  local some = redis.call('LRANGE', KEYS[2], after, math.min(after + step, last) - 1)
  for i = 1, #some do
    events[#events + 1] = some[i]
    bytes = bytes + #some[i]
    if bytes >= tonumber(ARGV[3]) then
      break
    end
  end
  if #some < step then
    break
  end
  after, step = after + step, step * 4
end
return {known[1], known[2], known[3], length, events, 0}
