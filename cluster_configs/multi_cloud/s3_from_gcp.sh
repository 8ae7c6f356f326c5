#!/usr/bin/env bash
# On a machine of Google Cloud, keeps a fresh token of its service account in a file, with which AWS gives it a role (web identity): the store in S3 is
# read and written without a key. The role trusts accounts.google.com for this account's id and the audience below; README has its trust policy.
#
#   bash s3_from_gcp.sh arn:aws:iam::000000000000:role/paris-gcp us-west-2       # from setup_commands; again does nothing
#
# Tested with a metadata server of our own making (tests/cluster_configs/test_multi_cloud.py), never on a machine of Google Cloud.
set -euo pipefail
role="$1" region="$2"
folder="$HOME/.aws_from_gcp" token="$HOME/.aws_from_gcp/token"
metadata="http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/service-accounts/default/identity"
mkdir -p "$folder" && chmod 700 "$folder"

cat >"$folder/refresh.sh" <<END
set -euo pipefail
curl --silent --show-error --fail --retry 5 -H 'Metadata-Flavor: Google' '$metadata?audience=sts.amazonaws.com&format=full' >'$token.new'
chmod 600 '$token.new' && mv '$token.new' '$token'
END
bash "$folder/refresh.sh"

# The token is good for an hour. A crontab that no daemon reads renews nothing.
{ command -v crontab && { pgrep -x cron || pgrep -x crond; }; } >/dev/null || {
  echo "No cron runs here, so nobody would renew the token, which ends after an hour; install and start it (apt-get install cron; systemctl enable --now cron)" >&2
  exit 1
}
line="*/20 * * * * bash $folder/refresh.sh"
crontab -l 2>/dev/null | grep -qxF "$line" || { crontab -l 2>/dev/null || true; echo "$line"; } | crontab -

# What AWS's libraries, and pyarrow's S3, look for; node.env reads it.
cat >"$folder/env" <<END
export AWS_ROLE_ARN=$role AWS_WEB_IDENTITY_TOKEN_FILE=$token AWS_ROLE_SESSION_NAME=paris AWS_REGION=$region
END
