#!/bin/sh
# Becomes the Redis or Valkey that its arguments start, with the users of users.acl:
#   start.sh valkey-server /etc/valkey/redis.conf
# Passwords are in files named redis_<user>_password in SECRETS; the server gets a copy with their SHA-256 in READY.
set -eu
USERS=${USERS:-/etc/valkey/users.acl}
SECRETS=${SECRETS:-/run/secrets}
READY=${READY:-/run/valkey/users.acl}

cp "$USERS" "$READY"
chmod 644 "$READY" # its reader is the user that the server becomes
for user in voucherd operator; do
    digest=$(tr -d '\n' <"$SECRETS/redis_${user}_password" | sha256sum | cut -d ' ' -f 1)
    sed -i "s/^user $user on #[0-9a-f]\{64\} /user $user on #$digest /" "$READY"
    grep -q "^user $user on #$digest " "$READY"
done
exec "$@" --aclfile "$READY"
