"""What a Redis server does at once, whoever else writes: scripts of `vista_ext.store.redis`."""

from __future__ import annotations

from vista_ext.store import record

_TIME = record.HEADER.fields["event_time"][1]  # type: ignore[index]

# Times are compared as two words, since Lua's numbers do not hold all of int64.
_TIMES = f"""
local function later(one, other)
  local low, high = struct.unpack('<I4i4', one, {_TIME + 1})
  local other_low, other_high = struct.unpack('<I4i4', other, {_TIME + 1})
  return high > other_high or (high == other_high and low > other_low)
end
local function erasure(key)
  local value = redis.call('GET', key)
  if value and #value ~= {record.HEADER_BYTES} then error('erasure: size expected {record.HEADER_BYTES} bytes') end
  return value
end
"""
# KEYS: the new record's, the name it should have, and the user's erasure; ARGV: its header, newest_wins, only_present.
# Whoever else writes, it decides and renames at once. A stored record whose header is not that of this key is damage,
# which is overwritten. A script that comes again, because its answer was lost, finds its work done.
NAME = f"""{_TIMES}
local new, stored = ARGV[1], redis.call('GETRANGE', KEYS[2], 0, {record.HEADER_BYTES - 1})
local size = redis.call('STRLEN', KEYS[1])
if size == 0 and stored == new then return 1 end
local keep = #stored == 0 and ARGV[3] == '1'
if ARGV[2] == '1' and size == redis.call('STRLEN', KEYS[2]) and stored:sub(1, {_TIME}) == new:sub(1, {_TIME}) then
  keep = later(stored, new)
end
local erased = erasure(KEYS[3])
if keep or (erased and not later(new, erased)) then
  redis.call('UNLINK', KEYS[1])
  return 0
end
redis.call('RENAME', KEYS[1], KEYS[2])
redis.call('PERSIST', KEYS[2])
return 1
"""
# KEYS: of an erasure; ARGV: what it should be, unless there is a later one.
KEEP_ERASURE = f"""{_TIMES}
local stored = erasure(KEYS[1])
if not stored or later(ARGV[1], stored) then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
"""
# KEYS: names of a user's records; ARGV: an erasure. A record that is not whole goes, too.
ERASE = f"""{_TIMES}
local erased = 0
for _, name in ipairs(KEYS) do
  local stored = redis.call('GETRANGE', name, 0, {record.HEADER_BYTES - 1})
  if #stored > 0 and (#stored < {record.HEADER_BYTES} or not later(stored, ARGV[1])) then
    erased = erased + redis.call('UNLINK', name)
  end
end
return erased
"""
# KEYS: of an erasure; ARGV: what it was when somebody decided that it may go.
DROP = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('UNLINK', KEYS[1]) end return 0"
