// Signs of one pixel's channels as words, with what the convolution's epilogue needs beside them. Shared by
// pack.cu and norm_pack.cu. Some lanes of a warp share a pixel; each makes bytes of eight channels.

struct PixelSums {
  int ones;          // channels with bit 1
  float magnitude;   // sum of |I|
};

// Bit i is whether values[i] >= -tau of channel `first + i`. NaN gives 0, and so do channels beyond the last.
__device__ __forceinline__ unsigned sign_byte(
    const float (&values)[8], const float* thresholds, int first, int channels, PixelSums& sums) {
  unsigned byte = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (first + i < channels) {
      float limit = thresholds ? -thresholds[first + i] : 0.0f;
      byte |= (values[i] >= limit ? 1u : 0u) << i;
      sums.magnitude = __fadd_rn(sums.magnitude, fabsf(values[i]));
    }
  }
  sums.ones += __popc(byte);
  return byte;
}

// The sums of all `lanes` (a power of two) that share a pixel, in every one of them. All 32 lanes must come here.
__device__ __forceinline__ PixelSums over_lanes(PixelSums sums, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    sums.ones += __shfl_xor_sync(~0u, sums.ones, distance);
    sums.magnitude = __fadd_rn(sums.magnitude, __shfl_xor_sync(~0u, sums.magnitude, distance));
  }
  return sums;
}

// Where the signs of a pixel and its sums go.
struct SignOutputs {
  Word* words;         // [pixels, ceil(channels / 32)]
  int* counts;         // [pixels]: bits that are 1
  float* magnitudes;   // [pixels]: sum of |I| / divisor; null: not needed
  float divisor;
};

__device__ __forceinline__ unsigned char* bytes_of(const SignOutputs& out, int pixel, int channels) {
  return reinterpret_cast<unsigned char*>(out.words + (size_t)pixel * ((channels + 31) / 32));
}

__device__ __forceinline__ void store_sums(const SignOutputs& out, int pixel, PixelSums sums) {
  out.counts[pixel] = sums.ones;
  if (out.magnitudes) out.magnitudes[pixel] = __fdiv_rn(sums.magnitude, out.divisor);
}
