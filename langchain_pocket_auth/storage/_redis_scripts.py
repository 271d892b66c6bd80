"""What Redis does in one step: a script for each call of the storage contract."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Script:
    """
    Lua for Redis 6.2 and newer, and for Valkey.

    Each has one key, the hash of a namespace, so that it runs on any cluster. A field
    is a record: its name, and packed (MessagePack) the namespace's text, version,
    value, end of its lifetime (0: none), lease holder and end of the lease. Versions
    stay text: Lua's numbers are doubles. Times are the server's, in milliseconds.
    """

    body: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        text = self.body.encode()
        sha = hashlib.sha1(text, usedforsecurity=False)  # EVALSHA's name for it
        object.__setattr__(self, "digest", sha.hexdigest())


_COMMON = """
local SPACE, VERSION, VALUE, EXPIRES, HOLDER, UNTIL = 1, 2, 3, 4, 5, 6
local hash, name = KEYS[1], ARGV[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function alive(packed)
  local record = packed and cmsgpack.unpack(packed)
  if record and (record[EXPIRES] == 0 or record[EXPIRES] > now) then
    return record
  end
end

local function find()
  return alive(redis.call('HGET', hash, name))
end

local function keep(record)
  redis.call('HSET', hash, name, cmsgpack.pack(record))
end
"""

GET = Script(
    _COMMON
    + """
local found = find()
return found and {found[VERSION], found[VALUE]}
"""
)

# The key itself ends a second after the last of its records, unless one has no end:
# only records say what is there, so the slack costs nothing. New records make others
# leave: of ten picked at random all that have ended, so that no more than about a
# tenth of a hash has.
PUT = Script(
    _COMMON
    + """
local space, version, value, expected, ttl = unpack(ARGV, 2)
local found = find()
if (found and found[VERSION] or '') ~= expected then
  return 0
end
local left = redis.call('PTTL', hash)
local expires = 0
if ttl ~= '' then
  expires = math.max(now + tonumber(ttl), 1)
end
keep({space, version, value, expires, '', 0})
if expires == 0 then
  redis.call('PERSIST', hash)
elseif left == -2 or (left >= 0 and now + left < expires + 500) then
  redis.call('PEXPIREAT', hash, string.format('%.0f', expires + 1000))
end
if expected == '' then
  local some = redis.call('HRANDFIELD', hash, 10, 'WITHVALUES')
  for i = 1, #some, 2 do
    if not alive(some[i + 1]) then
      redis.call('HDEL', hash, some[i])
    end
  end
end
return 1
"""
)

DELETE = Script(
    _COMMON
    + """
local found = find()
if not found or (ARGV[2] ~= '' and found[VERSION] ~= ARGV[2]) then
  return 0
end
return redis.call('HDEL', hash, name)
"""
)

TAKE = Script(
    _COMMON
    + """
local found = find()
if found then
  redis.call('HDEL', hash, name)
  return {found[VERSION], found[VALUE]}
end
"""
)

LEASE = Script(
    _COMMON
    + """
local found, holder = find(), ARGV[2]
if not found or (found[UNTIL] > now and found[HOLDER] ~= holder) then
  return 0
end
found[HOLDER], found[UNTIL] = holder, now + tonumber(ARGV[3])
keep(found)
return 1
"""
)

FREE = Script(
    _COMMON
    + """
local found = find()
if found and found[HOLDER] == ARGV[2] then
  found[HOLDER], found[UNTIL] = '', 0
  keep(found)
end
"""
)

REWRITE = Script(
    _COMMON
    + """
local found = find()
if not found or found[VERSION] ~= ARGV[3] then
  return 0
end
found[VALUE] = ARGV[2]
keep(found)
return 1
"""
)

# Who reads many records erases those that have ended.
_READ = """
local function read(fields, records)
  for i = 1, #fields, 2 do
    local found = alive(fields[i + 1])
    if found then
      records[#records + 1] = found[SPACE]
      records[#records + 1] = fields[i]
      records[#records + 1] = found[VERSION]
      records[#records + 1] = found[VALUE]
    else
      redis.call('HDEL', hash, fields[i])
    end
  end
  return records
end
"""

LIST = Script(
    _COMMON
    + _READ
    + """
return read(redis.call('HGETALL', hash), {})
"""
)

PAGE = Script(
    _COMMON
    + _READ
    + """
local found = redis.call('HSCAN', hash, ARGV[1], 'COUNT', ARGV[2])
return read(found[2], {found[1]})
"""
)
