// GroupNorm, FiLM and SiLU, then binarize and pack, in two passes over the activations (channels last):
//
//     group_statistics   mean and squared deviations of each group, in chunks of pixels
//     norm_pack          v = silu(norm(x) (1 + scale) + shift), norm(x) = (x - mean) / deviation gamma + beta,
//                        and the signs of v
//
// FiLM and SiLU may be absent. v itself is written only where something else reads it, such as the shortcut of the
// binary layer; where nothing is binarized, v alone is.
#include "device.cuh"
#include "signs.cuh"

struct NormArgs {
  const Activation* x;       // [images, pixels, channels]
  const float* gamma;        // [channels], or null: 1
  const float* beta;         // [channels], or null: 0
  const Activation* scale;   // FiLM [images, channels], or null
  const Activation* shift;   // [images, channels], null with scale
  const float* thresholds;   // [PLANES, channels]: tau, then delta of each further plane; null: one plane, no tau
  float* partials;           // [images, chunks, groups, 2]: mean, sum of squared deviations from it
  Activation* activations;   // [images, pixels, channels]: v, or null
  Word* words;               // [images, pixels, PLANES, ceil(channels / 32)]; null: v alone
  int* counts;               // [images, pixels, PLANES]
  float* magnitudes;         // [images, pixels], or null
  float divisor;             // of the magnitudes
  float epsilon;
  int pixels;                // of one image
  int channels;
  int groups;
  int chunks;
  int chunk_pixels;          // of every chunk but perhaps the last
  int silu;                  // 0: the norm alone
  int aligned;               // 1: eight channels may be loaded and stored at once
};

// Moments of a set of numbers, so that two sets can be joined without cancellation (Chan et al. 1979).
struct Moments {
  float count, mean, deviations;
};

__device__ __forceinline__ Moments join(Moments a, Moments b) {
  if (b.count == 0.0f) return a;
  float count = a.count + b.count, difference = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + difference * share,
          a.deviations + b.deviations + difference * difference * a.count * share};
}

__device__ __forceinline__ int pixels_of_chunk(const NormArgs& args, int chunk) {
  return min(args.chunk_pixels, args.pixels - chunk * args.chunk_pixels);
}

// Grid (chunks, images). A thread adds up some pixels of a channel, as differences from the chunk's first pixel:
// sums of squares of the values themselves would lose the variance of a large mean.
extern "C" __global__ void __launch_bounds__(256) group_statistics(NormArgs args) {
  SHARED_MEMORY(memory);
  float2* cells = reinterpret_cast<float2*>(memory);   // [rows, channels]: sum and sum of squares
  int columns = min(args.channels, (int)blockDim.x), rows = blockDim.x / columns;
  int row = threadIdx.x / columns, pixels = pixels_of_chunk(args, blockIdx.x);
  const Activation* x =
      args.x + ((size_t)blockIdx.y * args.pixels + (size_t)blockIdx.x * args.chunk_pixels) * args.channels;
  if (row < rows) {
    for (int channel = threadIdx.x % columns; channel < args.channels; channel += columns) {
      float origin = to_float(x[channel]);
      float2 sums = make_float2(0.0f, 0.0f);
      for (int pixel = row; pixel < pixels; pixel += rows) {
        float value = to_float(x[(size_t)pixel * args.channels + channel]) - origin;
        sums.x += value, sums.y += value * value;
      }
      cells[row * args.channels + channel] = sums;
    }
  }
  __syncthreads();
  int width = args.channels / args.groups;
  for (int group = threadIdx.x; group < args.groups; group += blockDim.x) {
    Moments total = {0.0f, 0.0f, 0.0f};
    for (int channel = group * width; channel < (group + 1) * width; channel++) {
      float origin = to_float(x[channel]);
      for (int r = 0; r < rows && r < pixels; r++) {
        float2 sums = cells[r * args.channels + channel];
        float count = (float)((pixels - r + rows - 1) / rows);
        total = join(total, {count, origin + sums.x / count, sums.y - sums.x * sums.x / count});
      }
    }
    size_t chunk = (size_t)blockIdx.y * args.chunks + blockIdx.x;
    float* result = args.partials + (chunk * args.groups + group) * 2;
    result[0] = total.mean, result[1] = total.deviations;
  }
}

// To about 2 units in the last place.
__device__ __forceinline__ float silu(float value) { return __fdividef(value, 1.0f + __expf(-value)); }

// Scale and shift of a channel: norm and FiLM of an image together are v = x scale + shift.
__device__ __forceinline__ float2 affine(const NormArgs& args, int image, int channel, float2 norm) {
  float scale = args.gamma ? norm.y * args.gamma[channel] : norm.y;
  float shift = (args.beta ? args.beta[channel] : 0.0f) - norm.x * scale;
  if (args.scale) {
    size_t place = (size_t)image * args.channels + channel;
    float film = 1.0f + to_float(args.scale[place]);
    scale *= film, shift = shift * film + to_float(args.shift[place]);
  }
  return make_float2(scale, shift);
}

// v is rounded to its type first: later readers get it so, and signs and magnitude must be those of the same numbers.
__device__ __forceinline__ void apply(const float2 (&affines)[8], int with_silu, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float value = __fmaf_rn(values[i], affines[i].x, affines[i].y);
    values[i] = to_float(from_float(with_silu ? silu(value) : value));
  }
}

// Grid (any, images).
extern "C" __global__ void __launch_bounds__(256) norm_pack(NormArgs args) {
  SHARED_MEMORY(memory);
  float2* norms = reinterpret_cast<float2*>(memory);                 // [groups]: mean, 1 / deviation
  float* offsets = reinterpret_cast<float*>(norms + args.groups);   // [OFFSETS]
  int width = args.channels / args.groups, image = blockIdx.y;
  for (int group = threadIdx.x; group < args.groups; group += blockDim.x) {
    Moments total = {0.0f, 0.0f, 0.0f};
    for (int chunk = 0; chunk < args.chunks; chunk++) {
      const float* part = args.partials + (((size_t)image * args.chunks + chunk) * args.groups + group) * 2;
      total = join(total, {(float)pixels_of_chunk(args, chunk) * width, part[0], part[1]});
    }
    norms[group] = make_float2(total.mean, 1.0f / sqrtf(total.deviations / total.count + args.epsilon));
  }
  if (PLANES > 1) load_offsets(args.thresholds, args.channels, offsets);
  __syncthreads();

  SignOutputs out = {args.words, args.counts, args.magnitudes, args.divisor, args.channels};
  PixelLanes lanes = own_lanes();
  float limits[ROUNDS][8];
  float2 affines[ROUNDS][8];
  load_limits(args.thresholds, lanes, args.channels, limits);
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      int channel = first_channel(lanes, round) + i;
      affines[round][i] = make_float2(0.0f, 0.0f);
      if (channel < args.channels) affines[round][i] = affine(args, image, channel, norms[channel / width]);
    }
  }
  for (int first = 0; first < args.pixels; first += lanes.count) {
    int within = first + lanes.index, pixel = image * args.pixels + within;
    bool exists = within < args.pixels;
    PixelSums sums = {};
    size_t place = (size_t)pixel * args.channels;
#pragma unroll
    for (int start = 0; start < ROUNDS; start += PREFETCH) {
      float values[PREFETCH][8];
#pragma unroll
      for (int i = 0; i < PREFETCH; i++) {
        int channel = first_channel(lanes, start + i);
        if (exists) load_channels(args.x + place, channel, args.channels, args.aligned, values[i]);
      }
#pragma unroll
      for (int i = 0; i < PREFETCH; i++) {
        if (!exists || start + i >= ROUNDS) continue;
        int channel = first_channel(lanes, start + i);
        apply(affines[start + i], args.silu, values[i]);
        if (args.activations)
          store_channels(args.activations + place, channel, args.channels, args.aligned, values[i]);
        if (args.words) {
          unsigned bytes[PLANES];
          sign_bytes(values[i], limits[start + i], offsets + channel / 8, sums, bytes);
          store_bytes(out, pixel, channel, bytes);
        }
      }
    }
    if (args.words) store_sums(out, lanes, pixel, exists, sums);
  }
}
