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
    password=$(cat "$SECRETS/redis_${user}_password")
    if [ "${#password}" -lt 16 ]; then # an empty file would be an empty password
        echo "start.sh: $SECRETS/redis_${user}_password holds no password of at least 16 characters" >&2
        exit 1
    fi
    digest=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
    sed -i "s/^user $user on #[0-9a-f]\{64\} /user $user on #$digest /" "$READY"
    grep -q "^user $user on #$digest " "$READY"
done
exec "$@" --aclfile "$READY"
