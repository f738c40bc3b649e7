// A program of its own for one launch, so that a sanitizer sees this launch and no Python. It reads
//
//     grid x, grid y, threads, schedule, shared bytes, argument bytes, pointers: uint64 each
//     the arguments
//     for every pointer: its place in the arguments and its size in bytes, uint64, then the contents
//
// gives every pointer memory of exactly its size, launches, and writes all contents back in the same order.
#pragma once
#include <cstdio>

namespace host {

inline void read(std::FILE* file, void* target, size_t size) {
  if (std::fread(target, 1, size, file) != size) std::abort();
}

template <class Args>
int run_from_files(void (*kernel)(Args), const char* input, const char* output) {
  std::FILE* file = std::fopen(input, "rb");
  uint64_t header[7];
  read(file, header, sizeof header);
  schedule = static_cast<int>(header[3]);
  std::vector<unsigned char> args(header[5]);
  read(file, args.data(), args.size());
  std::vector<std::pair<unsigned char*, size_t>> contents;
  for (uint64_t i = 0; i < header[6]; i++) {
    uint64_t place[2];
    read(file, place, sizeof place);
    auto* memory = static_cast<unsigned char*>(std::malloc(place[1]));
    read(file, memory, place[1]);
    std::memcpy(args.data() + place[0], &memory, sizeof memory);
    contents.emplace_back(memory, place[1]);
  }
  std::fclose(file);
  const char* error = launch(kernel, static_cast<unsigned>(header[0]), static_cast<unsigned>(header[1]),
                             static_cast<unsigned>(header[2]), header[4], args.data());
  if (error) {
    std::fprintf(stderr, "%s\n", error);
    return 1;
  }
  file = std::fopen(output, "wb");
  for (auto& [memory, size] : contents) {
    std::fwrite(memory, 1, size, file);
    std::free(memory);
  }
  return std::fclose(file);
}

}  // namespace host
