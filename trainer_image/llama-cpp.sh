#!/usr/bin/env bash
# Install those tools of llama.cpp that make and try the GGUF export: llama-cpp.sh DESTINATION PYTHON [TARGET...]
#
# The sources are those that llama-cpp-python ships on PyPI, pinned by their digest; llama.cpp itself publishes none
# there. PYTHON needs pip and, to run the converter, what requirements/trainer.txt lists. Needs cmake and a C++ compiler.
# More targets may follow (the tests' llama-debug).
set -euo pipefail

VERSION=0.3.36
SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e

destination=$1
python=$2
targets=(llama-quantize llama-completion "${@:3}")
stamp="$VERSION $SHA256 ${targets[*]}"
if [ "$(cat "$destination/VERSION" 2> /dev/null)" = "$stamp" ]; then
  exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "llama-cpp-python==$VERSION --hash=sha256:$SHA256" > "$work/pin.txt"
# Not `--no-binary :all:`: older pips, such as Debian's, then make what the sources are built with from sources, too.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python --require-hashes \
  --requirement "$work/pin.txt" --dest "$work"
tar -xzf "$work/llama_cpp_python-$VERSION.tar.gz" -C "$work"
source="$work/llama_cpp_python-$VERSION/vendor/llama.cpp"

# More than half of the work would be the tools' common library: 45 files with the same large headers. So it is compiled
# in one piece, but for two files that don't bear it. And full optimization is only for what computes, which is in C.
cat > "$work/in-one-piece.cmake" << 'END'
cmake_language(DEFER CALL set_target_properties llama-common PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 64)
cmake_language(DEFER CALL set_source_files_properties common/json.cpp common/jinja/value.cpp
  TARGET_DIRECTORY llama-common PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
END
# No GGML_NATIVE: the machine that merges isn't the one that builds. No network code: only files are read and written.
cmake -S "$source" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF \
  -DGGML_OPENMP=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF \
  -DCMAKE_PROJECT_llama.cpp_INCLUDE="$work/in-one-piece.cmake" \
  -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" -DLLAMA_ALL_WARNINGS=OFF -DGGML_ALL_WARNINGS=OFF \
  -DCMAKE_EXE_LINKER_FLAGS="-static-libstdc++ -static-libgcc" > "$work/cmake.log"
cmake --build "$work/build" --parallel "$(nproc)" --target "${targets[@]}" > "$work/build.log" 2>&1 \
  || { tail -n 40 "$work/build.log" >&2; exit 1; }

rm -rf "$destination"
mkdir -p "$destination"
for part in convert_hf_to_gguf.py conversion gguf-py LICENSE; do cp -r "$source/$part" "$destination/"; done
for target in "${targets[@]}"; do install -s "$work/build/bin/$target" "$destination/"; done
echo "$stamp" > "$destination/VERSION"
