// The product for one instruction set; included by lowbit.cpp once for each, with
//   LOWBIT_NAMESPACE  its name
//   LOWBIT_LANES      32-bit lanes of a vector: 8 (AVX2) or 16 (AVX-512)
//   LOWBIT_DOT        1: a lane holds two columns in int16 (vpdpwssd); 0: one in float32 (FMA)
//   TARGET            the attribute that lets a function use it
// "Word" means the 32 bits of a lane: LOWBIT_DOT + 1 columns.

namespace LOWBIT_NAMESPACE {

#define INLINE TARGET __attribute__((always_inline)) inline

constexpr int kLanes = LOWBIT_LANES;
constexpr int kWordColumns = LOWBIT_DOT ? 2 : 1;
constexpr int kBlockWords = kBlock / kWordColumns;
constexpr int kVectors = kTile / kLanes;  // in the 64 rows of a tile

#if LOWBIT_LANES == 16

typedef __m512 Floats;
typedef uint32_t Words __attribute__((vector_size(64)));

INLINE Floats zeros() { return _mm512_setzero_ps(); }
INLINE Floats broadcast(float v) { return _mm512_set1_ps(v); }
INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }           // c + ab
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }     // c - ab
INLINE Floats from_unsigned_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
INLINE Floats from_signed_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// kLanes values from element `index` of an array, as float32.
INLINE Floats load_as(int dtype, const uint8_t* p, int64_t index) {
  p += index * element_size(dtype);
  if (dtype == kFloat32) return _mm512_loadu_ps(p);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (dtype == kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The reverse, rounded to nearest even.
INLINE void store_as(int dtype, uint8_t* p, int64_t index, Floats v) {
  p += index * element_size(dtype);
  if (dtype == kFloat32) return _mm512_storeu_ps(p, v);
  __m256i half;
  if (dtype == kFloat16) {
    half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m512i word = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

#else

typedef __m256 Floats;
typedef uint32_t Words __attribute__((vector_size(32)));

INLINE Floats zeros() { return _mm256_setzero_ps(); }
INLINE Floats broadcast(float v) { return _mm256_set1_ps(v); }
INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE Floats from_unsigned_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
INLINE Floats from_signed_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

INLINE Floats load_as(int dtype, const uint8_t* p, int64_t index) {
  p += index * element_size(dtype);
  if (dtype == kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (dtype == kFloat16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE void store_as(int dtype, uint8_t* p, int64_t index, Floats v) {
  p += index * element_size(dtype);
  if (dtype == kFloat32) return _mm256_storeu_ps(reinterpret_cast<float*>(p), v);
  __m128i half;
  if (dtype == kFloat16) {
    half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m256i word = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(word, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    half = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}

#endif

// Unpack<bits>: load() reads the part of a step that belongs to vector v of the tile's rows, at() gives word j of it,
// j < kWords. kOffset is added to every code (what the tables hold), to be taken off again through the sum of x.

constexpr int64_t cell_offset(int v) { return kLanes == 16 ? v * kCell : v / 2 * kCell; }

template <int BITS>
struct Unpack;

#if LOWBIT_DOT

// Of words, and of their sums. With __m512i, gcc 12 stores the sums of multiply_unpacked to memory in every step.
typedef int32_t Lanes __attribute__((vector_size(64)));
typedef int32_t Word;

INLINE Lanes no_lanes() { return Lanes{}; }
INLINE Lanes load_words(const Word* p) { return (Lanes)_mm512_loadu_si512(p); }
INLINE void store_words(Word* p, Lanes v) { _mm512_storeu_si512(p, (__m512i)v); }

template <>
struct Unpack<4> {
  static constexpr int kWords = 4;
  static constexpr int kOffset = 0;
  typedef __m512i Raw;
  __m512i table;  // the 16 codes, twice over: vpermw looks at 5 bits
  INLINE Unpack() {
    alignas(64) int16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = int16_t((i % 16 ^ 8) - 8);
    table = _mm512_load_si512(values);
  }
  INLINE Raw load(const uint8_t* step, int v) const { return _mm512_loadu_si512(step + cell_offset(v)); }
  INLINE Lanes at(Raw raw, int j) const {
    typedef uint16_t Halves __attribute__((vector_size(64)));
    return (Lanes)_mm512_permutexvar_epi16((__m512i)((Halves)raw >> (4 * j)), table);
  }
};

template <>
struct Unpack<8> {
  static constexpr int kWords = 2;
  static constexpr int kOffset = 0;
  typedef const uint8_t* Raw;
  __m512i interleave;  // 16 rows of a column and 16 of the next become 16 pairs
  INLINE Unpack() {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = uint16_t(i % 2 * 16 + i / 2);
    interleave = _mm512_load_si512(order);
  }
  INLINE Raw load(const uint8_t* step, int v) const { return step + cell_offset(v); }
  INLINE Lanes at(Raw raw, int j) const {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(raw + 32 * j));
    return (Lanes)_mm512_permutexvar_epi16(interleave, _mm512_cvtepi8_epi16(codes));
  }
};

// sum + word . x, two columns
INLINE Lanes accumulate(Lanes sum, Lanes word, const Word* x) {
  return (Lanes)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)word, _mm512_set1_epi32(*x));
}

// A token's group of x: integers times a power of two, and the integers' sum.
struct XGroup {
  int32_t sum;
  float scale;
};

// Integers of x: its leading 16 bits, and 15 more for the tokens and groups that need them.
constexpr int kPasses = 2;
// In units, what half of a group must have for the leading ones to do: as many bits as the dtype has.
constexpr int least(int x_dtype) { return x_dtype == kBfloat16 ? 1 << 8 : 1 << 11; }

INLINE Lanes from_zero_points(const uint8_t* p, int middle) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Lanes)_mm512_cvtepu8_epi32(bytes) - middle;
}

INLINE Floats to_floats(Lanes sum) { return _mm512_cvtepi32_ps((__m512i)sum); }

static_assert(int64_t(kMaxGroup) * 128 * 32768 * 2 < int64_t(1) << 31, "a sum less its zero point's part fits int32");

// sum, less zero times x's: exact until it becomes float32.
INLINE Floats without_zero(Lanes sum, Lanes zero, const XGroup& x) {
  const __m512i part = _mm512_mullo_epi32((__m512i)zero, _mm512_set1_epi32(x.sum));
  return to_floats((Lanes)_mm512_sub_epi32((__m512i)sum, part));
}
INLINE Floats scaled(Floats sum, const XGroup& x) { return mul(sum, broadcast(x.scale)); }
// In a later pass: a token that does without; its words there are whatever memory held.
INLINE bool is_absent(const XGroup& x) { return x.scale == 0; }

#else

typedef Floats Lanes;
typedef float Word;

INLINE Lanes no_lanes() { return zeros(); }
INLINE Lanes load_words(const Word* p) { return load(p); }
INLINE void store_words(Word* p, Lanes v) { store(p, v); }

template <>
struct Unpack<4> {
  static constexpr int kWords = 8;
  typedef Words Raw;
#if LOWBIT_LANES == 16
  static constexpr int kOffset = 0;
  __m512 table;
  INLINE Unpack() { table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1); }
#else
  // Without a table of 16: a nibble put into the upper mantissa of 16.0 is 16 + q, hence 24 + c. Three instructions that
  // run on three ports; sign extension and conversion would be three for the two ports that FMA needs.
  static constexpr int kOffset = 24;
#endif
  INLINE Raw load(const uint8_t* step, int v) const {
    Raw raw;
    memcpy(&raw, step + v * sizeof(Raw), sizeof(Raw));
    return raw;
  }
  INLINE Floats at(Raw raw, int j) const {
    const int shift = j / 2 * 4 + j % 2 * 16;
#if LOWBIT_LANES == 16
    return _mm512_permutexvar_ps((__m512i)(raw >> shift), table);
#else
    const Words moved = shift < 19 ? raw << (19 - shift) : raw >> (shift - 19);
    return (Floats)((moved & 0x00780000) ^ 0x41c00000);  // 16.0 with its upper mantissa bit set: c + 8 = c ^ 8
#endif
  }
};

template <>
struct Unpack<8> {
  static constexpr int kWords = 4;
  static constexpr int kOffset = 0;
  typedef const uint8_t* Raw;
  INLINE Raw load(const uint8_t* step, int v) const { return step + cell_offset(v) + v * kLanes % 16; }
  INLINE Floats at(Raw raw, int j) const { return from_signed_bytes(raw + 16 * j); }
};

INLINE Lanes accumulate(Lanes sum, Lanes word, const Word* x) { return multiply_add(word, broadcast(*x), sum); }

// The sum of a token's group of x.
struct XGroup {
  float sum;
};

constexpr int kPasses = 1;

INLINE Lanes from_zero_points(const uint8_t* p, int middle) {
  return sub(from_unsigned_bytes(p), broadcast(float(middle)));
}
INLINE Floats without_zero(Lanes sum, Lanes zero, const XGroup& x) {
  return multiply_subtract(zero, broadcast(x.sum), sum);
}
INLINE Floats to_floats(Lanes sum) { return sum; }
INLINE Floats scaled(Floats sum, const XGroup&) { return sum; }
INLINE bool is_absent(const XGroup&) { return false; }

#endif

constexpr int64_t kPanelBytes = kPasses * kBlockWords * sizeof(Word), kXGroupBytes = kPasses * sizeof(XGroup);

// A group of a tile: what turns its sums into weights' products.
struct Group {
  float scale[kTile];
  Word zero[kTile];  // relative to the unpacked codes
  bool has_zero;
};

inline const uint8_t* group_weights(const Call& call, const Tile& tile, int64_t g) {
  return tile.weights + g * tile_bytes(tile.bits, call.group_size);
}

template <int BITS>
INLINE void load_group(const Call& call, const Tile& tile, int64_t g, Group& group) {
  constexpr int kMiddle = (1 << (BITS - 1)) - Unpack<BITS>::kOffset;
  group.has_zero = tile.zero_points || Unpack<BITS>::kOffset != 0;
  for (int i = 0; i < kTile; i += kLanes)
    store(group.scale + i, load_as(call.scale_dtype, tile.scales, g * kTile + i));
  if (tile.zero_points)
    for (int i = 0; i < kTile; i += kLanes)
      store_words(group.zero + i, from_zero_points(tile.zero_points + g * kTile + i, kMiddle));
  else if (group.has_zero)
    for (int i = 0; i < kTile; i++) group.zero[i] = Unpack<BITS>::kOffset;
}

// totals[m][row] += scale * (sums - zero * x[m].sum) for NB vectors of rows from `first`.
template <int MB, int NB>
INLINE void add_group(const Lanes (&sums)[NB][MB], const Group& group, const XGroup* x, int first, float* totals) {
  const bool has_zero = group.has_zero;
#pragma GCC unroll 8
  for (int b = 0; b < NB; b++) {
    const int row = (first + b) * kLanes;
    const Floats scale = load(group.scale + row);
    const Lanes zero = has_zero ? load_words(group.zero + row) : no_lanes();
#pragma GCC unroll 12
    for (int m = 0; m < MB; m++) {
      if (is_absent(x[m])) continue;
      float* total = totals + m * kTile + row;
      const Floats sum = has_zero ? without_zero(sums[b][m], zero, x[m]) : to_floats(sums[b][m]);
      store(total, multiply_add(scale, scaled(sum, x[m]), load(total)));
    }
  }
}

// MB tokens times NB vectors of rows from `first`, straight from the packed codes of a group.
template <int BITS, int MB, int NB>
INLINE void multiply_packed(const Unpack<BITS>& unpack, const uint8_t* weights, int blocks, const Word* x,
                            int64_t x_stride, const Group& group, const XGroup* x_groups, int first, float* totals) {
  constexpr int kWords = Unpack<BITS>::kWords;
  Lanes sums[NB][MB];
#pragma GCC unroll 8
  for (int b = 0; b < NB; b++)
#pragma GCC unroll 12
    for (int m = 0; m < MB; m++) sums[b][m] = no_lanes();
  for (int block = 0; block < blocks; block++, x += x_stride)
#pragma GCC unroll 1
    for (int word = 0; word < kBlockWords; word += kWords, weights += kStep) {
      typename Unpack<BITS>::Raw raw[NB];
#pragma GCC unroll 8
      for (int b = 0; b < NB; b++) {
        const uint8_t* cell = weights + cell_offset(first + b);
        _mm_prefetch(reinterpret_cast<const char*>(cell + kPrefetchL2), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(cell + kPrefetchL1), _MM_HINT_T0);
        raw[b] = unpack.load(weights, first + b);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kWords; j++) {
        Lanes words[NB];
#pragma GCC unroll 8
        for (int b = 0; b < NB; b++) words[b] = unpack.at(raw[b], j);
#pragma GCC unroll 12
        for (int m = 0; m < MB; m++)
#pragma GCC unroll 8
          for (int b = 0; b < NB; b++)
            sums[b][m] = accumulate(sums[b][m], words[b], x + m * kBlockWords + word + j);
      }
    }
  add_group<MB, NB>(sums, group, x_groups, first, totals);
}

// How often a group is multiplied for `count` tokens.
INLINE int passes_of(const Call& call, const XGroup* x, int64_t count) {
#if LOWBIT_DOT
  for (int64_t m = 0; m < count; m++)
    if (!is_absent(x[call.pass_groups() + m])) return kPasses;
#endif
  return 1;
}

// All groups of a tile for MB tokens.
template <int BITS, int MB>
TARGET void multiply_few(const Call& call, const Tile& tile, float* totals) {
  // Accumulators: NB * MB of the 32 (AVX2: 16) registers.
  constexpr int NB = kLanes == 16 ? (MB <= 4 ? 4 : 2) : (MB <= 2 ? 4 : 2);
  const Unpack<BITS> unpack;
  const int blocks = call.group_size / kBlock;
  const int64_t x_stride = MB * kBlockWords, group_bytes = tile_bytes(BITS, call.group_size);
  const uint8_t* weights = tile.weights;
  const Word* x = static_cast<const Word*>(call.x_panel);
  const XGroup* x_groups = static_cast<const XGroup*>(call.x_groups);
  for (int64_t g = 0; g < call.groups(); g++, weights += group_bytes, x += blocks * x_stride, x_groups += MB) {
    Group group;
    load_group<BITS>(call, tile, g, group);
    const int passes = passes_of(call, x_groups, MB);
    for (int pass = 0; pass < passes; pass++)
#pragma GCC unroll 1
      for (int first = 0; first < kVectors; first += NB)
        multiply_packed<BITS, MB, NB>(unpack, weights, blocks, x + pass * call.pass_words(kBlockWords), x_stride, group,
                                      x_groups + pass * call.pass_groups(), first, totals);
  }
}

// unpacked: [words of the group][kTile]. What will be unpacked next is fetched while this group is multiplied.
template <int BITS>
TARGET void unpack_group(const uint8_t* weights, const uint8_t* next, int words, Word* unpacked) {
  constexpr int kWords = Unpack<BITS>::kWords;
  const Unpack<BITS> unpack;
  for (int word = 0; word < words; word += kWords, weights += kStep, next += kStep, unpacked += kWords * kTile)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      _mm_prefetch(reinterpret_cast<const char*>(next + cell_offset(v)), _MM_HINT_T1);
      const auto raw = unpack.load(weights, v);
#pragma GCC unroll 8
      for (int j = 0; j < kWords; j++) store_words(unpacked + j * kTile + v * kLanes, unpack.at(raw, j));
    }
}

constexpr int kRegisterTokens = 6, kRegisterVectors = kLanes == 16 ? 4 : 2;  // 24 of 32, 12 of 16 registers

// MB tokens times kRegisterVectors vectors of unpacked codes.
template <int MB>
TARGET void multiply_unpacked(const Word* unpacked, int blocks, const Word* x, int64_t x_stride, const Group& group,
                              const XGroup* x_groups, int first, float* totals) {
  constexpr int NB = kRegisterVectors;
  Lanes sums[NB][MB];
#pragma GCC unroll 8
  for (int b = 0; b < NB; b++)
#pragma GCC unroll 12
    for (int m = 0; m < MB; m++) sums[b][m] = no_lanes();
  unpacked += first * kLanes;
  for (int block = 0; block < blocks; block++, x += x_stride)
#pragma GCC unroll 4
    for (int word = 0; word < kBlockWords; word++, unpacked += kTile) {
      Lanes words[NB];
#pragma GCC unroll 8
      for (int b = 0; b < NB; b++) words[b] = load_words(unpacked + b * kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < MB; m++)
#pragma GCC unroll 8
        for (int b = 0; b < NB; b++) sums[b][m] = accumulate(sums[b][m], words[b], x + m * kBlockWords + word);
    }
  add_group<MB, NB>(sums, group, x_groups, first, totals);
}

typedef void (*MultiplyUnpacked)(const Word*, int, const Word*, int64_t, const Group&, const XGroup*, int, float*);
constexpr MultiplyUnpacked kMultiplyUnpacked[kRegisterTokens] = {
    multiply_unpacked<1>, multiply_unpacked<2>, multiply_unpacked<3>,
    multiply_unpacked<4>, multiply_unpacked<5>, multiply_unpacked<6>,
};

// Group g of a tile for all tokens. next: the weights that come after it.
template <int BITS>
TARGET void multiply_many(const Call& call, const Tile& tile, int64_t g, const uint8_t* next, Word* unpacked,
                          float* totals) {
  const int blocks = call.group_size / kBlock;
  const int64_t tokens = call.tokens, x_stride = tokens * kBlockWords;
  unpack_group<BITS>(group_weights(call, tile, g), next, blocks * kBlockWords, unpacked);
  Group group;
  load_group<BITS>(call, tile, g, group);
  const Word* x = static_cast<const Word*>(call.x_panel) + g * blocks * x_stride;
  const XGroup* x_groups = static_cast<const XGroup*>(call.x_groups) + g * tokens;
  const int64_t parts = (tokens + kRegisterTokens - 1) / kRegisterTokens;
  for (int64_t part = 0, first_token = 0; part < parts; part++) {
    const int64_t count = (tokens - first_token + parts - part - 1) / (parts - part);
    const int passes = passes_of(call, x_groups + first_token, count);
    for (int pass = 0; pass < passes; pass++) {
      const Word* part_x = x + pass * call.pass_words(kBlockWords) + first_token * kBlockWords;
      const XGroup* part_groups = x_groups + pass * call.pass_groups() + first_token;
      for (int first = 0; first < kVectors; first += kRegisterVectors)
        kMultiplyUnpacked[count - 1](unpacked, blocks, part_x, x_stride, group, part_groups, first,
                                     totals + first_token * kTile);
    }
    first_token += count;
  }
}

constexpr int kFewTokens = kLanes == 16 ? 12 : 6;
typedef void (*MultiplyFew)(const Call&, const Tile&, float*);
template <int BITS>
constexpr MultiplyFew kMultiplyFew[12] = {
    multiply_few<BITS, 1>, multiply_few<BITS, 2>, multiply_few<BITS, 3>, multiply_few<BITS, 4>,
    multiply_few<BITS, 5>, multiply_few<BITS, 6>,
#if LOWBIT_LANES == 16
    multiply_few<BITS, 7>, multiply_few<BITS, 8>, multiply_few<BITS, 9>, multiply_few<BITS, 10>,
    multiply_few<BITS, 11>, multiply_few<BITS, 12>,
#endif
};

// y = totals + bias, rounded, for the rows of a tile.
TARGET void store_tile(const Call& call, const Tile& tile, const float* totals) {
  const int64_t size = element_size(call.x_dtype);
  uint8_t bias[kTile * 4] = {}, ragged[kTile * 4];
  if (call.bias) memcpy(bias, call.bias + tile.first * size, size_t(tile.rows * size));
  for (int64_t m = 0; m < call.tokens; m++, totals += kTile) {
    uint8_t* y = call.y + (m * call.y_stride + tile.first) * size;
    uint8_t* out = tile.rows == kTile ? y : ragged;
    for (int i = 0; i < kTile; i += kLanes) {
      Floats v = load(totals + i);
      if (call.bias) v = add(v, load_as(call.x_dtype, bias, i));
      store_as(call.x_dtype, out, i, v);
    }
    if (out == ragged) memcpy(y, ragged, size_t(tile.rows * size));
  }
}

// Item of lowbit_linear: some tiles for all tokens. scratch: an unpacked group, then totals [tiles][tokens][kTile].
TARGET void multiply(const Call& call, int64_t item, uint8_t* scratch) {
  Word* unpacked = reinterpret_cast<Word*>(scratch);
  float* totals = reinterpret_cast<float*>(unpacked + kMaxGroup * kTile);
  const int64_t begin = item * call.item_tiles, left = call.tiles - begin, size = call.tokens * kTile;
  const int count = int(left < call.item_tiles ? left : call.item_tiles);
  Tile tiles[kMaxItem];
  for (int t = 0; t < count; t++) tiles[t] = call.tile(begin + t);
  memset(totals, 0, size_t(count * size * 4));
  if (call.tokens <= kFewTokens) {
    for (int t = 0; t < count; t++) {
      const MultiplyFew function = (tiles[t].bits == 4 ? kMultiplyFew<4> : kMultiplyFew<8>)[call.tokens - 1];
      function(call, tiles[t], totals + t * size);
    }
  } else {
    for (int64_t g = 0; g < call.groups(); g++)
      for (int t = 0; t < count; t++) {
        const uint8_t* next = t + 1 < count ? group_weights(call, tiles[t + 1], g) : group_weights(call, tiles[0], g + 1);
        if (tiles[t].bits == 4) multiply_many<4>(call, tiles[t], g, next, unpacked, totals + t * size);
        else multiply_many<8>(call, tiles[t], g, next, unpacked, totals + t * size);
      }
  }
  for (int t = 0; t < count; t++) store_tile(call, tiles[t], totals + t * size);
}

#if LOWBIT_DOT

// What becomes of one token's group: integers into the panel, their sum and scale.
INLINE void pack_integers(const Call& call, const Floats (&integers)[kMaxGroup / kLanes], int unit, Word* out,
                          XGroup* group) {
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < call.group_size / kLanes; i++) {
    const __m512i part = _mm512_cvtps_epi32(integers[i]);
    sum = _mm512_add_epi32(sum, part);
    __m256i* place = reinterpret_cast<__m256i*>(out + i / 2 * call.tokens * kBlockWords + i % 2 * 8);
    _mm256_storeu_si256(place, _mm512_cvtsepi32_epi16(part));
  }
  const int scale = unit << 23;
  memcpy(&group->scale, &scale, 4);
  group->sum = _mm512_reduce_add_epi32(sum);
}

// One token of x into the panel, and its sum and scale per group, in units of a power of two (its exponent is biased by
// 127). A group with an infinity or NaN is NaN.
TARGET void pack_x(const Call& call, int64_t token, uint8_t*) {
  const uint8_t* x = call.x + token * call.columns * element_size(call.x_dtype);
  Word* out = static_cast<Word*>(call.x_panel) + token * kBlockWords;
  XGroup* group = static_cast<XGroup*>(call.x_groups) + token;
  const int count = call.group_size / kLanes;
  for (int64_t first = 0; first < call.columns; first += call.group_size, group += call.tokens) {
    Floats values[kMaxGroup / kLanes];
    __m512i largest = _mm512_setzero_si512();  // floats that are not negative compare like their bits
    for (int i = 0; i < count; i++) {
      values[i] = load_as(call.x_dtype, x, first + i * kLanes);
      const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(values[i]), _mm512_set1_epi32(0x7fffffff));
      largest = _mm512_max_epi32(largest, magnitude);
    }
    const int exponent = _mm512_reduce_max_epi32(largest) >> 23;
    const int unit = (exponent < 15 ? 15 : exponent) - 14;  // not denormal
    const Floats inverse = _mm512_castsi512_ps(_mm512_set1_epi32((254 - unit) << 23));
    int present = 0, small = 0;
    for (int i = 0; i < count; i++) {
      values[i] = mul(values[i], inverse);
      const __mmask16 is_present = _mm512_cmp_ps_mask(values[i], zeros(), _CMP_NEQ_UQ);
      present += __builtin_popcount(is_present);
      const Floats enough = broadcast(float(least(call.x_dtype)));
      small += __builtin_popcount(_mm512_mask_cmp_ps_mask(is_present, _mm512_abs_ps(values[i]), enough, _CMP_LT_OQ));
    }
    pack_integers(call, values, unit, out, group);
    XGroup* rest = group + call.pass_groups();
    *rest = {};
    if (exponent == 255) {
      group->scale = __builtin_nanf("");
    } else if (2 * small > present && unit > 15) {  // or the unit of the rest were denormal
      for (int i = 0; i < count; i++) {
        const Floats leading = _mm512_roundscale_ps(values[i], _MM_FROUND_TO_NEAREST_INT);
        values[i] = mul(sub(values[i], leading), broadcast(1 << 15));
      }
      pack_integers(call, values, unit - 15, out + call.pass_words(kBlockWords), rest);
    }
    out += call.group_size / kBlock * call.tokens * kBlockWords;
  }
}

#else

// One token of x into the panel, and its sums per group.
TARGET void pack_x(const Call& call, int64_t token, uint8_t*) {
  const uint8_t* x = call.x + token * call.columns * element_size(call.x_dtype);
  Word* out = static_cast<Word*>(call.x_panel) + token * kBlockWords;
  XGroup* group = static_cast<XGroup*>(call.x_groups) + token;
  const int group_blocks = call.group_size / kBlock;
  Floats sum = zeros();
  for (int64_t block = 0; block < call.columns / kBlock; block++, out += call.tokens * kBlockWords) {
    for (int i = 0; i < kBlock; i += kLanes) {
      const Floats v = load_as(call.x_dtype, x, block * kBlock + i);
      store(out + i, v);
      sum = add(sum, v);
    }
    if ((block + 1) % group_blocks == 0) {
      float lanes[kLanes], total = 0;
      store(lanes, sum);
      for (float lane : lanes) total += lane;
      group->sum = total;
      group += call.tokens;
      sum = zeros();
    }
  }
}

template <int BITS>
TARGET void dequantize_tile(const Call& call, const Tile& tile, float* unpacked) {
  for (int64_t g = 0; g < call.groups(); g++) {
    unpack_group<BITS>(group_weights(call, tile, g), group_weights(call, tile, g + 1), call.group_size, unpacked);
    Group group;
    load_group<BITS>(call, tile, g, group);
    for (int k = 0; k < call.group_size; k++) {
      const int64_t row = (g * call.group_size + k) * call.y_stride + tile.first;
      for (int i = 0; i < kTile; i += kLanes) {
        Floats v = load(unpacked + k * kTile + i);
        if (group.has_zero) v = sub(v, load(group.zero + i));
        store_as(call.x_dtype, call.y, row + i, mul(v, load(group.scale + i)));
      }
    }
  }
}

// Item of lowbit_dequantize: a tile.
TARGET void dequantize(const Call& call, int64_t item, uint8_t* scratch) {
  const Tile tile = call.tile(item);
  if (tile.bits == 4) dequantize_tile<4>(call, tile, reinterpret_cast<float*>(scratch));
  else dequantize_tile<8>(call, tile, reinterpret_cast<float*>(scratch));
}

#endif

#undef INLINE

}  // namespace LOWBIT_NAMESPACE

#undef LOWBIT_NAMESPACE
#undef LOWBIT_LANES
#undef LOWBIT_DOT
#undef TARGET
