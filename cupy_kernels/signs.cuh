// Signs of one pixel's channels as words, with the count and magnitude that the convolution's epilogue reads.
// Shared by pack.cu and norm_pack.cu.
//
// A pixel has LANES of a warp (a power of two), and each makes ROUNDS bytes of eight channels: byte
// lane + round * LANES. A lane keeps the thresholds of its channels in registers for all its pixels, and loads the
// channels of PREFETCH rounds before it uses the first.
//
// Of several planes each has the signs of what the planes before it left over, in float32 throughout:
//
//     z_1 = I + tau,   b_p = z_p >= 0 ? 1 : -1,   z_(p+1) = z_p - delta_p b_p

#define BYTES (LANES * ROUNDS)   // of a pixel and plane
#define PREFETCH (ROUNDS < 4 ? ROUNDS : 4)

struct PixelSums {
  int ones[PLANES];  // channels with bit 1
  float magnitude;   // sum of |I|
};

struct PixelLanes {
  int lane;          // of LANES
  int index, count;  // of the pixels that the grid's x axis takes at once
};

__device__ __forceinline__ PixelLanes own_lanes() {
  int thread = blockIdx.x * blockDim.x + threadIdx.x;
  return {thread % LANES, thread / LANES, (int)(gridDim.x * blockDim.x / LANES)};
}

__device__ __forceinline__ int first_channel(const PixelLanes& lanes, int round) {
  return 8 * (lanes.lane + round * LANES);
}

// Eight activations from `channel` on; 0 beyond the pixel's last.
__device__ __forceinline__ void load_channels(
    const Activation* pixel, int channel, int channels, bool aligned, float (&values)[8]) {
  if (aligned && channel + 8 <= channels) return load_eight(pixel + channel, values);
#pragma unroll
  for (int i = 0; i < 8; i++) values[i] = channel + i < channels ? to_float(pixel[channel + i]) : 0.0f;
}

__device__ __forceinline__ void store_channels(
    Activation* pixel, int channel, int channels, bool aligned, const float (&values)[8]) {
  if (aligned && channel + 8 <= channels) return store_eight(pixel + channel, values);
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (channel + i < channels) pixel[channel + i] = from_float(values[i]);
}

// -tau of a lane's channels. Nothing reaches the limit of channels beyond the last.
__device__ __forceinline__ void load_limits(
    const float* thresholds, const PixelLanes& lanes, int channels, float (&limits)[ROUNDS][8]) {
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      int channel = first_channel(lanes, round) + i;
      float limit = thresholds && channel < channels ? -thresholds[channel] : 0.0f;
      limits[round][i] = channel < channels ? limit : __uint_as_float(0x7f800000u);
    }
  }
}

#define OFFSETS ((PLANES - 1) * 8 * BYTES)

// delta of all channels in shared memory, [PLANES - 1][8][BYTES]: the lanes of a warp read neighbours, and registers
// would not hold those of wide layers. The block waits before it reads them.
__device__ inline void load_offsets(const float* thresholds, int channels, float* offsets) {
  for (int i = threadIdx.x; i < OFFSETS; i += blockDim.x) {
    int channel = 8 * (i % BYTES) + i / BYTES % 8, row = 1 + i / (8 * BYTES);
    offsets[i] = channel < channels ? thresholds[row * channels + channel] : 0.0f;
  }
}

// Bit i of the first plane's byte is 1 if values[i] reaches its limit; NaN does not. `offsets`: from the byte's own on.
__device__ __forceinline__ void sign_bytes(
    const float (&values)[8], const float (&limits)[8], const float* offsets, PixelSums& sums,
    unsigned (&bytes)[PLANES]) {
#pragma unroll
  for (int plane = 0; plane < PLANES; plane++) bytes[plane] = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    bool reached = values[i] >= limits[i];
    if (reached) bytes[0] |= 1u << i;
    float z = __fsub_rn(values[i], limits[i]);
#pragma unroll
    for (int plane = 1; plane < PLANES; plane++) {
      float offset = offsets[((plane - 1) * 8 + i) * BYTES];
      z = __fsub_rn(z, reached ? offset : -offset);
      reached = z >= 0.0f;
      if (reached) bytes[plane] |= 1u << i;
    }
    sums.magnitude = __fadd_rn(sums.magnitude, fabsf(values[i]));
  }
#pragma unroll
  for (int plane = 0; plane < PLANES; plane++) sums.ones[plane] += __popc(bytes[plane]);
}

// Destinations of a pixel's signs and sums.
struct SignOutputs {
  Word* words;         // [pixels, PLANES, ceil(channels / 32)], or null
  int* counts;         // [pixels, PLANES]: bits that are 1
  float* magnitudes;   // [pixels]: sum of |I| / divisor, or null
  float divisor;
  int channels;
};

__device__ __forceinline__ void store_bytes(
    const SignOutputs& out, int pixel, int channel, const unsigned (&bytes)[PLANES]) {
  int words = (out.channels + 31) / 32;
  if (channel >= 32 * words) return;
#pragma unroll
  for (int plane = 0; plane < PLANES; plane++) {
    Word* target = out.words + ((size_t)pixel * PLANES + plane) * words;
    reinterpret_cast<unsigned char*>(target)[channel / 8] = (unsigned char)bytes[plane];
  }
}

// Sum over a pixel's lanes and store. All 32 lanes of the warp must come here, also those without a pixel.
__device__ __forceinline__ void store_sums(
    const SignOutputs& out, const PixelLanes& lanes, int pixel, bool exists, PixelSums sums) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++)
      sums.ones[plane] += __shfl_xor_sync(~0u, sums.ones[plane], distance);
    sums.magnitude = __fadd_rn(sums.magnitude, __shfl_xor_sync(~0u, sums.magnitude, distance));
  }
  if (!exists || lanes.lane != 0) return;
#pragma unroll
  for (int plane = 0; plane < PLANES; plane++) out.counts[pixel * PLANES + plane] = sums.ones[plane];
  if (out.magnitudes) out.magnitudes[pixel] = __fdiv_rn(sums.magnitude, out.divisor);
}
