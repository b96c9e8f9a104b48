#!/bin/sh
# Starts one role of the service once every secret that it needs is there and is no default.
# Usage: entrypoint.sh postgres|ledger|mlflow|head|worker [ARGUMENTS...], or healthy for the health checks of our images.
set -eu

SECRETS=${HELDOUT_SECRETS_DIR:-/run/secrets}

refuse() {
    echo "heldout: $1" >&2
    exit 64
}

# secret NAME: print the secret, or say what must be done about its file.
secret() {
    file=$SECRETS/$1
    [ -r "$file" ] || refuse "the secret $1 must be in a file that can be read, but $file is not; see docker/README.md"
    value=$(tr -d '\r\n' <"$file")
    case $(printf %s "$value" | tr '[:upper:]' '[:lower:]') in
    '') refuse "the secret $1 must not be empty; put a password of its own into its file" ;;
    *password* | *changeme* | *change-me* | *change_me* | *default* | *example* | *secret* | *12345* | postgres* | mlflow* | heldout* | admin*)
        refuse "the secret $1 must be no default and no word that is guessed first; put a random one into its file"
        ;;
    esac
    [ "${#value}" -ge 16 ] || refuse "the secret $1 must have at least 16 characters, but has ${#value}"
    case $value in
    *[!A-Za-z0-9._~+=-]*) refuse "the secret $1 must be letters, digits and . _ ~ + = - alone; it becomes a header" ;;
    esac
    printf %s "$value"
}

# takes URI SECRET: see that a database takes us, before something is started that would say it in a hundred lines.
takes() {
    said=$(python -c 'import psycopg, sys; psycopg.connect(sys.argv[1], connect_timeout=30).close()' "$1" 2>&1) ||
        refuse "the database postgresql://${1##*@} must take us with the secret $2, but: $(last "$said")"
}

last() {
    printf %s "$1" | tail -n 1
}

role=${1:?one of postgres, ledger, mlflow, head, worker, healthy}
shift

case $role in
postgres)
    # The image reads the file itself; here it is only looked at.
    value=$(secret postgres_password)
    unset value
    exec docker-entrypoint.sh postgres "$@"
    ;;
ledger)
    PGPASSWORD=$(secret postgres_password)
    LEDGER_PASSWORD=$(secret ledger_password)
    export PGPASSWORD LEDGER_PASSWORD
    said=$(psql --username heldout --dbname heldout --no-password --no-psqlrc --quiet --set ON_ERROR_STOP=1 \
        --file "${0%/*}/ledger.sql" "$@" 2>&1) ||
        refuse "PostgreSQL must make the ledger's role and tables for the secret postgres_password, but: $(last "$said")"
    ;;
mlflow)
    PGPASSWORD=$(secret postgres_password)
    MLFLOW_AUTH_ADMIN_PASSWORD=$(secret mlflow_password)
    MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret mlflow_cookies)
    export PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
    store=${MLFLOW_BACKEND_STORE_URI:-postgresql://heldout@postgres/heldout}
    case $store in
    postgresql://*) takes "$store" postgres_password ;;
    esac
    # Jobs are for features that nothing here uses: four times the memory and start-up.
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
    exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 --workers "${MLFLOW_WORKERS:-4}" \
        --backend-store-uri "$store" \
        --serve-artifacts --artifacts-destination "${MLFLOW_ARTIFACTS_DESTINATION:-/artifacts}" \
        --allowed-hosts "${MLFLOW_ALLOWED_HOSTS:-mlflow,mlflow:5000,localhost:*,127.0.0.1:*}" "$@"
    ;;
head | worker)
    value=$(secret ray_token)
    unset value
    # Ray reads the file by itself; without the mode it would serve everybody.
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$SECRETS/ray_token
    export RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH RAY_USAGE_STATS_ENABLED=0
    if [ "$role" = worker ]; then
        exec ray start --address "${RAY_HEAD:-head:6379}" --disable-usage-stats --block "$@"
    fi
    MLFLOW_TRACKING_PASSWORD=$(secret mlflow_password)
    export MLFLOW_TRACKING_PASSWORD
    case ${HELDOUT_LEDGER:-} in
    postgresql://*)
        PGPASSWORD=$(secret ledger_password)
        export PGPASSWORD
        # What an older release has recorded there must go on counting.
        [ ! -s "${HELDOUT_WORKSPACE:-/workspace}/ledger.jsonl" ] ||
            refuse "the ledger must stay the file that this workspace has, but HELDOUT_LEDGER names a database; see Upgrade in docker/README.md"
        takes "$HELDOUT_LEDGER" ledger_password
        ;;
    esac
    # No trial runs beside the drivers of all studies.
    exec ray start --head --port 6379 --dashboard-host 0.0.0.0 --dashboard-port 8265 --num-cpus 0 \
        --disable-usage-stats --block "$@"
    ;;
healthy)
    if [ -n "${MLFLOW_AUTH_CONFIG_PATH:-}" ]; then
        exec python -c 'import urllib.request as r; r.urlopen("http://127.0.0.1:5000/health", timeout=5)'
    fi
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$SECRETS/ray_token"
    exec ray health-check --address "${RAY_HEAD:-127.0.0.1:6379}"
    ;;
*) refuse "the role must be one of postgres, ledger, mlflow, head, worker and healthy, but got $role" ;;
esac
