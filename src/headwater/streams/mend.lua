-- Delete what something else has written under the names of a run's keys, which its type tells.
--
-- KEYS  1 stream:{<run>}:metadata   should be a hash
--       2 stream:{<run>}:chunks     a list
--       3 stream:{<run>}:run        a string
--       4 stream:{<run>}:behind     a set
--
-- Returns the names of those that are deleted.

local kinds = {'hash', 'list', 'string', 'set'}
local foreign = {}
for i, key in ipairs(KEYS) do
  local kind = redis.call('TYPE', key).ok
  if kind ~= 'none' and kind ~= kinds[i] then
    redis.call('DEL', key)
    foreign[#foreign + 1] = key
  end
end
return foreign
