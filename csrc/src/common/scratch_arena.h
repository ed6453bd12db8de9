// All scratch memory of one call, in pieces that begin at a cache line.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace NW_ISA {
namespace {

inline int64_t round_up_to_cache_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

class ScratchArena {
 public:
  ScratchArena() = default;
  ~ScratchArena() {
    for (int i = 0; i < count_; ++i) std::free(pieces_[i]);
  }
  ScratchArena(const ScratchArena&) = delete;
  ScratchArena& operator=(const ScratchArena&) = delete;
  float* floats(int64_t n) { return static_cast<float*>(bytes(n * int64_t(sizeof(float)))); }
  void* bytes(int64_t n) {
    void* piece = std::aligned_alloc(64, size_t(round_up_to_cache_lines(n > 0 ? n : 1)));
    if (!piece || count_ == max_pieces) {
      std::free(piece);
      failed_ = true;
      return nullptr;
    }
    return pieces_[count_++] = piece;
  }
  bool failed() const { return failed_; }

 private:
  static constexpr int max_pieces = 32;
  void* pieces_[max_pieces];
  int count_ = 0;
  bool failed_ = false;
};

}  // namespace
}  // namespace NW_ISA
