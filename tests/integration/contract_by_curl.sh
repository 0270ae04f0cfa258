#!/bin/sh
# Asks a running daemon for everything that the contract promises of the API of the
# document, by curl, and says "ok" or "FAIL" for each line.
#
# Usage: contract_by_curl.sh BASE [curl options, such as --cacert FILE]
#
# The daemon is one to try things on: it must run whatever it is told, and must have at
# most 16 places for running tasks and 20 for waiting ones, e.g.
#
#   python -m pulsar_api --port 8081 --state-dir ./try --max-running 3 \
#       --max-queued 2 --command "sh -c 'eval \"\$PULSAR_VAR_run\"'"
#
#   contract_by_curl.sh http://localhost:8081
#
# Exit status: 0 if every line is ok, else 1.

set -u
base=${1:?the address of the daemon, like http://localhost:8081}
shift

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
failed=0

# -- asking: $code is the status, $work/body the body, $work/head the head.

ask() {
    path=$1
    shift
    : >"$work/body"
    code=$(curl --silent --show-error --max-time 60 --config "$work/options" \
        --output "$work/body" --dump-header "$work/head" --write-out '%{http_code}' \
        "$@" "$base$path")
}

get() {
    ask "$@"
}

head_of() {
    ask "$1" --head
}

post() {
    ask "$@" --request POST
}

start() { # LINE OF SHELL: sets $id
    post /site/production --data-urlencode "action=run" \
        --data-urlencode "variables[run]=$1"
    id=$(number taskId)
}

prints() { # TEXT: waits until the output of task $id is this
    version=0
    while ! is 200 "\"output\": \"$1\""; do
        get "/task/$id/output?since=$version"
        version=$(number version)
    done
}

number() { # FIELD of $work/body
    sed -n "s/.*\"$1\": \([0-9][0-9]*\).*/\1/p" "$work/body" | head -n 1
}

# -- judging

say() { # RESULT SENTENCE
    if [ "$1" -eq 0 ]; then
        echo "ok   $2"
    else
        echo "FAIL $2"
        echo "FAIL   last answer: $code $(head -c 300 "$work/body" | tr '\n' ' ')"
        failed=1
    fi
}

check() { # SENTENCE COMMAND...
    sentence=$1
    shift
    "$@"
    say $? "$sentence"
}

is() { # STATUS [TEXTS THAT THE BODY HAS...]
    [ "$code" = "$1" ] || return 1
    shift
    for text in "$@"; do
        grep -qF -e "$text" "$work/body" || return 1
    done
}

lacks() { # TEXT
    ! grep -qF -e "$1" "$work/body"
}

exactly() { # TEXT
    [ "$code" = 200 ] && [ "$(cat "$work/body")" = "$1" ]
}

unchanged() {
    exactly '{"changed": false}'
}

header() { # NAME TEXT
    tr -d '\r' <"$work/head" | grep -i "^$1: " | grep -qF -e "$2"
}

is_problem() { # STATUS [TEXTS...]
    header Content-Type application/problem+json &&
        is "$@" '"type": ' '"title": ' '"detail": ' '"error": ' "\"status\": $1"
}

was_at_once() { # BEGAN
    [ $(($(date +%s) - $1)) -lt 20 ]
}

# The options of the command line, quoted so that a space in one stays in it: curl reads
# them from a file.
: >"$work/options"
while [ $# -gt 0 ]; do
    case $1 in
    --*)
        printf '%s' "${1#--}" >>"$work/options"
        case ${2-} in
        --* | '') echo >>"$work/options" ;;
        *)
            printf ' = "%s"\n' "$2" >>"$work/options"
            shift
            ;;
        esac
        ;;
    *)
        echo "FAIL options are given in their long form: $1"
        exit 1
        ;;
    esac
    shift
done

# -- is it there, and does it do what it is told?

get /tasks
if [ "$code" != 200 ]; then
    echo "FAIL $base/tasks answers $code"
    exit 1
fi
start 'echo ready'
get "/task/$id/state"
if ! is 200 '"output": "ready\n"'; then
    echo "FAIL the daemon does not run what it is told; see the head of this script"
    exit 1
fi

# -- GET /tasks

get /tasks
check 'GET /tasks: 200 and JSON' header Content-Type application/json
check 'GET /tasks: the url of the page' is 200 "\"url\": \"$base/pulsar/index.html\""
check 'GET /tasks: tasks by their numbers' is 200 "\"$id\": {\"id\": $id, "
for field in id status app env action exitCode output pid version outputSize command \
    signal reason variables user waitingFor createdAt startedAt endedAt cpuSeconds memoryPeak url; do
    check "a task has $field" is 200 "\"$field\": "
done
start 'exit 5'
get "/task/$id/state"
get '/tasks?limit=1'
check 'GET /tasks?limit: so many' is 200 "\"$id\": {"
check 'GET /tasks?limit: not more' lacks "\"$((id - 1))\": {"
check 'GET /tasks?limit: a link to the next page' header Link 'rel="next"'
check 'GET /tasks?limit: which begins where this one ends' header Link "before=$id"
get "/tasks?before=$id"
check 'GET /tasks?before: the older ones' is 200 "\"$((id - 1))\": {"
check 'GET /tasks?before: not the newer ones' lacks "\"$id\": {"
get '/tasks?status=failed&app=site&env=production'
check 'GET /tasks?status&app&env: what matches' is 200 "\"$id\": {"
check 'GET /tasks?status: not what does not' lacks '"status": "finished"'
get '/tasks?app=nobody'
check 'GET /tasks?app: nothing of another app' is 200 '"tasks": {}'
get '/tasks?user=nobody'
check 'GET /tasks?user: nothing of another user' is 200 '"tasks": {}'
get '/tasks?limit=1001'
check 'GET /tasks?limit=1001: 400' is_problem 400 '"field": "limit"'

# -- ?output

start 'head -c 5000 /dev/zero | tr "\0" "\176"; echo end'
get "/task/$id/state?output=none"
check '?output=none: no output' is 200 '"output": ""' '"outputSize": 5004'
get "/task/$id?output=tail"
check '?output=tail: the last 4 KiB' is 200 '"outputOffset": 908' '~end\n"}'
get "/tasks?limit=1"
check 'GET /tasks: the last 4 KiB by itself' is 200 '"outputOffset": 908' '~end\n"}'
get "/tasks?limit=1&output=full"
check 'GET /tasks?output=full: all' lacks outputOffset
get "/task/$id"
check 'GET /task/:id: all by itself' lacks outputOffset

# -- GET /tasks/created

get '/tasks/created?timeout=0.2'
check 'GET /tasks/created: exactly unchanged at the time-out' unchanged
# The one who waits may come late: create tasks until it has seen one.
curl --silent --max-time 60 --config "$work/options" \
    --output "$work/created" "$base/tasks/created" &
waiter=$!
while kill -0 $waiter 2>/dev/null; do
    start 'exit 0'
    get "/task/$id/state"
done
wait $waiter
mv "$work/created" "$work/body"
check 'GET /tasks/created: the next task' is 200 '{"changed": true, "task": {"id": '
start 'exit 0' && first=$id
start 'exit 0'
get "/tasks/created?since=$((first - 1))"
check 'GET /tasks/created?since: the oldest newer one' is 200 "{\"id\": $first, "
get "/tasks/created?since=$first"
check 'GET /tasks/created?since: then the next' is 200 "{\"id\": $id, "

# -- POST /:app/:env

post /shop/staging --header 'Content-Type: application/json' \
    --data '{"action": "deploy", "variables": {"run": "exit 0", "n": 7}}'
id=$(number id)
check 'POST of JSON: taskId, id, url' is 200 \
    "{\"taskId\": $id, \"id\": $id, \"url\": \"$base/web#job/$id\"}"
check 'POST: Location' header Location "/task/$id"
get "/task/$id"
check 'POST of JSON: action and variables' is 200 '"action": "deploy"' '"n": "7"'
check 'POST: the URL says app and env' is 200 '"app": "shop"' '"env": "staging"'
post /shop/staging --data 'action=deploy' --data 'variables[n]=8'
get "/task/$(number id)"
check 'POST of a form: action and variables' is 200 '"action": "deploy"' '"n": "8"'
post '/shop/staging?action=deploy'
get "/task/$(number id)"
check 'POST with action in the query' is 200 '"action": "deploy"'
post '/shop/staging?action=query' --data 'action=body'
get "/task/$(number id)"
check 'POST: the body before the query' is 200 '"action": "body"'
post /shop/staging
check 'POST without action: 400' is_problem 400 '"field": "action"'
post '/shop/staging' --data-urlencode 'action=$(id)'
check 'POST with a wrong action: 400' is_problem 400 '"field": "action"'
post '/shop/--conf-repo=x?action=deploy'
check 'POST with a wrong env: 400' is_problem 400 '"field": "env"'
post '/shop/staging?action=deploy' --header 'Content-Type: text/xml' --data '<x/>'
check 'POST of another type: 415' is_problem 415
head -c 1100000 /dev/zero >"$work/large"
post '/shop/staging?action=deploy' --data-binary "@$work/large"
check 'POST of more than 1 MiB: 413' is_problem 413

# -- GET /task/:id

start 'echo one; exec sleep 1000'
running=$id
prints 'one\n'
get "/task/$running"
check 'GET /task/:id: a running task with its output' is 200 \
    '"status": "running"' '"output": "one\n"' '"exitCode": null'
tag=$(tr -d '\r' <"$work/head" | sed -n 's/^[Ee][Tt]ag: //p')
get "/task/$running" --header "If-None-Match: $tag"
check 'GET /task/:id: 304 by its ETag' is 304
check 'GET /task/:id: 304 without a body' [ ! -s "$work/body" ]
get /task/999999999
check 'GET /task/:id: 404 for an unknown number' is_problem 404

# -- long-polls of a task

get "/task/$running/output?timeout=0"
check 'GET /task/:id/output: exactly unchanged at the time-out' unchanged
get "/task/$running/state?timeout=0"
check 'GET /task/:id/state: exactly unchanged at the time-out' unchanged
began=$(date +%s)
get "/task/$running/output?timeout=2"
check 'GET /task/:id/output?timeout: unchanged' unchanged
check 'GET /task/:id/output?timeout: waits so long' [ $(($(date +%s) - began)) -ge 1 ]
began=$(date +%s)
get "/task/$running/output?since=0"
check 'GET /task/:id/output?since: another version at once' was_at_once "$began"
check 'GET /task/:id/output?since: the task' is 200 '{"changed": true, "task": {'
get "/task/$running/state?since=0"
check 'GET /task/:id/state?since: another version at once' is 200 '"status": "running"'
get "/task/$running/output?timeout=99999"
check 'GET /task/:id/output?timeout: not longer than the daemon says' \
    is_problem 400 '"field": "timeout"'

start 'while :; do echo more; sleep 0.1; done'
get "/task/$id/output"
check 'GET /task/:id/output: new output' is 200 '{"changed": true, "task": {'
get "/task/$id/state?timeout=1"
check 'GET /task/:id/state: not ended by output' unchanged
get "/task/$id/kill"
get "/task/$id/state"

start 'sleep 1; exit 6'
get "/task/$id/state"
check 'GET /task/:id/state: the end' is 200 '{"changed": true, ' '"exitCode": 6'
began=$(date +%s)
get "/task/$id/state"
check 'GET /task/:id/state: an ended task at once' is 200 '"exitCode": 6'
get "/task/$id/output"
check 'GET /task/:id/output: an ended task at once' is 200 '"exitCode": 6'
check 'ended tasks are answered at once' was_at_once "$began"

start 'printf "a\342\202\254b"'
get "/task/$id/state"
get "/task/$id/output?offset=1"
check 'GET /task/:id/output?offset: from there' is 200 '"output": "€b"' '"nextOffset": 5'
get "/task/$id/output?offset=3"
check 'GET /task/:id/output?offset: no half character' is 200 '"output": "€b"'
get "/task/$id/output?offset=4"
check 'GET /task/:id/output?offset: only what is new' is 200 '"output": "b"'

# -- the queue

waiting=
full=
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
    start 'exec sleep 1000'
    full="$full $id"
    get "/task/$id"
    if is 200 '"status": "created"' '"waitingFor": "'; then
        waiting=$id
        break
    fi
done
check 'a task that has no place waits and says for what' [ -n "$waiting" ]
get "/task/$waiting/output?timeout=0.2"
check 'GET /task/:id/output waits for a waiting task' unchanged
get "/task/$waiting/state?timeout=0.2"
check 'GET /task/:id/state waits for a waiting task' unchanged
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21; do
    start 'exec sleep 1000'
    [ "$code" = 200 ] || break
    full="$full $id"
done
check 'POST: 503 if too many wait' is_problem 503
check 'POST: 503 says when to try again' header Retry-After ''
get "/task/$waiting/kill"
check 'kill of a waiting task' is 200 '"status": "killed"' '"pid": null'
for task in $full; do
    get "/task/$task/kill"
done
for task in $full; do
    get "/task/$task/state"
done

# -- kill

head_of "/task/$running/kill"
check 'HEAD of kill: 200' [ "$code" = 200 ]
get "/task/$running"
check 'HEAD of kill kills nothing' is 200 '"status": "running"' '"reason": null'
get "/task/$running/kill" --header 'Sec-Fetch-Site: cross-site'
check 'GET kill for another site: 403' is_problem 403
get "/task/$running/kill" --header 'Origin: https://evil.example'
check 'GET kill with a foreign Origin: 403' is_problem 403
post '/site/production?action=run' --header 'Sec-Fetch-Site: same-site'
check 'POST for another site: 403' is_problem 403
post '/site/production?action=run' --header 'Origin: https://evil.example'
check 'POST with a foreign Origin: 403' is_problem 403
get "/task/$running"
check 'and nothing was killed' is 200 '"status": "running"' '"reason": null'
get "/task/$running/kill"
check 'GET kill: 200 and the task' is 200 "{\"id\": $running, "
get "/task/$running/state"
check 'GET kill: the task is killed' is 200 '"status": "killed"' '"exitCode": null'
cp "$work/body" "$work/before"
get "/task/$running/kill"
check 'GET kill of an ended task: 200' is 200 '"status": "killed"'
post "/task/$running/kill"
check 'POST kill of an ended task: 200' is 200 '"status": "killed"'
get "/task/$running/state"
check 'kill of an ended task changes nothing' cmp -s "$work/before" "$work/body"
start 'sleep 1000 & sleep 1000 & echo up; wait'
prints 'up\n'
post "/task/$id/kill" --header "Origin: $base" --header 'Sec-Fetch-Site: same-origin'
check 'POST kill by our own page: 200 and the task' is 200 "{\"id\": $id, "
get "/task/$id/state"
check 'POST kill: the task is killed' is 200 '"status": "killed"'

# -- the page, HEAD, OPTIONS, 405

get /pulsar/index.html
check 'GET /pulsar/index.html: 200' is 200 '/task/:id/kill'
check 'GET /pulsar/index.html: HTML' header Content-Type text/html
start 'exec sleep 1000'
began=$(date +%s)
for path in /tasks /tasks/created "/task/$id" "/task/$id/output" "/task/$id/state" \
    "/task/$id/kill" /pulsar/index.html; do
    head_of "$path"
    check "HEAD $path: 200" [ "$code" = 200 ]
done
check 'HEAD of a long-poll is answered at once' was_at_once "$began"
get "/task/$id/kill"
for path in /tasks /tasks/created "/task/$id" "/task/$id/output" "/task/$id/state" \
    "/task/$id/kill" /pulsar/index.html /site/production; do
    ask "$path" --request OPTIONS
    check "OPTIONS $path: Allow" header Allow OPTIONS
    ask "$path" --request DELETE
    check "DELETE $path: 405" is_problem 405
    check "DELETE $path: Allow" header Allow OPTIONS
done

# -- Host

get '/tasks?limit=1' --header 'Host: evil.example'
check 'a foreign Host header does not decide where links point' lacks evil.example
get '/tasks?limit=1' --header 'Host: localhost:12345'
check 'a loopback Host header does' is 200 '://localhost:12345/pulsar/index.html"'

# -- a large output

start 'head -c 40000000 /dev/zero | tr "\0" "\176"'
get "/task/$id/state"
found=$(tr -cd '~' <"$work/body" | wc -c)
check '40 MB of output come complete' [ "$found" -eq 40000000 ]

exit $failed
