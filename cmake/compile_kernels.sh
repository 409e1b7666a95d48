#!/bin/sh
# compile_kernels.sh OBJECT COMMAND...: runs nvcc in the build folder, and
# - names sources by their place in the project, since the object keeps the name that nvcc was
#   called with (the folder has a link to csrc);
# - keeps what ptxas says of every kernel in OBJECT.ptxas, for bench/kernel_report.py; other
#   messages go where they would have gone.
project=${0%/cmake/*}
object=$1
shift
for argument; do
  shift
  case $argument in
    "$PWD"/*) argument=${argument#"$PWD"/} ;;
    "$project"/csrc/*) argument=${argument#"$project"/} ;;
  esac
  set -- "$@" "$argument"
done
"$@" 2> "$object.messages"
status=$?
grep -E '^ptxas|^ +[0-9]+ bytes stack frame' "$object.messages" > "$object.ptxas"
grep -vE '^ptxas (info|\.)|^ +[0-9]+ bytes stack frame' "$object.messages" >&2
rm -f "$object.messages"
exit $status
