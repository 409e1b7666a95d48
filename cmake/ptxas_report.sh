#!/bin/sh
# ptxas_report.sh OBJECT COMMAND...: runs a compiler and keeps what ptxas says of every kernel in
# OBJECT.ptxas, for bench/kernel_report.py; other messages go where they would have gone.
object=$1
shift
"$@" 2> "$object.messages"
status=$?
grep -E '^ptxas|^ +[0-9]+ bytes stack frame' "$object.messages" > "$object.ptxas"
grep -vE '^ptxas (info|\.)|^ +[0-9]+ bytes stack frame' "$object.messages" >&2
rm -f "$object.messages"
exit $status
