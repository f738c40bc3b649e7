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

struct NormJob {
  const Activation* x;       // [images, pixels, channels]
  const float* gamma;        // [channels], or null: 1
  const float* beta;         // [channels], or null: 0
  const Activation* scale;   // FiLM [images, channels], or null
  const Activation* shift;   // [images, channels], null with scale
  const float* thresholds;   // tau [channels], or null
  float* partials;           // [images, chunks, groups, 2]: mean, sum of squared deviations from it
  Activation* activations;   // [images, pixels, channels]: v, or null
  Word* words;               // [images, pixels, ceil(channels / 32)]; null: v alone
  int* counts;               // [images, pixels]
  float* magnitudes;         // [images, pixels], or null
  float divisor;             // of the magnitudes
  float epsilon;
  int pixels;                // of one image
  int channels;
  int groups;
  int chunks;
  int chunk_pixels;          // of every chunk but perhaps the last
  int silu;                  // 0: the norm alone
  int aligned;               // whether eight channels may be loaded and stored at once
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

__device__ __forceinline__ int pixels_of_chunk(const NormJob& job, int chunk) {
  return min(job.chunk_pixels, job.pixels - chunk * job.chunk_pixels);
}

// Grid (chunks, images). A thread adds up some pixels of a channel, as differences from the chunk's first pixel:
// sums of squares of the values themselves would lose the variance of a large mean.
extern "C" __global__ void __launch_bounds__(256) group_statistics(NormJob job) {
  SHARED_MEMORY(memory);
  float2* cells = reinterpret_cast<float2*>(memory);   // [rows, channels]: sum and sum of squares
  int columns = min(job.channels, (int)blockDim.x), rows = blockDim.x / columns;
  int row = threadIdx.x / columns, pixels = pixels_of_chunk(job, blockIdx.x);
  const Activation* x =
      job.x + ((size_t)blockIdx.y * job.pixels + (size_t)blockIdx.x * job.chunk_pixels) * job.channels;
  if (row < rows) {
    for (int channel = threadIdx.x % columns; channel < job.channels; channel += columns) {
      float origin = to_float(x[channel]);
      float2 sums = make_float2(0.0f, 0.0f);
      for (int pixel = row; pixel < pixels; pixel += rows) {
        float value = to_float(x[(size_t)pixel * job.channels + channel]) - origin;
        sums.x += value, sums.y += value * value;
      }
      cells[row * job.channels + channel] = sums;
    }
  }
  __syncthreads();
  int width = job.channels / job.groups;
  for (int group = threadIdx.x; group < job.groups; group += blockDim.x) {
    Moments total = {0.0f, 0.0f, 0.0f};
    for (int channel = group * width; channel < (group + 1) * width; channel++) {
      float origin = to_float(x[channel]);
      for (int r = 0; r < rows && r < pixels; r++) {
        float2 sums = cells[r * job.channels + channel];
        float count = (float)((pixels - r + rows - 1) / rows);
        total = join(total, {count, origin + sums.x / count, sums.y - sums.x * sums.x / count});
      }
    }
    float* result = job.partials + (((size_t)blockIdx.y * job.chunks + blockIdx.x) * job.groups + group) * 2;
    result[0] = total.mean, result[1] = total.deviations;
  }
}

// To about 2 units in the last place.
__device__ __forceinline__ float silu(float value) { return __fdividef(value, 1.0f + __expf(-value)); }

// Scale and shift of a channel: norm and FiLM of an image together are v = x scale + shift.
__device__ __forceinline__ float2 affine(const NormJob& job, int image, int channel, float2 norm) {
  float scale = job.gamma ? norm.y * job.gamma[channel] : norm.y;
  float shift = (job.beta ? job.beta[channel] : 0.0f) - norm.x * scale;
  if (job.scale) {
    size_t place = (size_t)image * job.channels + channel;
    float film = 1.0f + to_float(job.scale[place]);
    scale *= film, shift = shift * film + to_float(job.shift[place]);
  }
  return make_float2(scale, shift);
}

// What reads v later reads it rounded: its signs and magnitude must be those of the same numbers.
__device__ __forceinline__ void apply(const float2 (&affines)[8], int with_silu, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float value = __fmaf_rn(values[i], affines[i].x, affines[i].y);
    values[i] = to_float(from_float(with_silu ? silu(value) : value));
  }
}

// Grid (any, images).
extern "C" __global__ void __launch_bounds__(256) norm_pack(NormJob job) {
  SHARED_MEMORY(memory);
  float2* norms = reinterpret_cast<float2*>(memory);   // [groups]: mean, 1 / deviation
  int width = job.channels / job.groups, image = blockIdx.y;
  for (int group = threadIdx.x; group < job.groups; group += blockDim.x) {
    Moments total = {0.0f, 0.0f, 0.0f};
    for (int chunk = 0; chunk < job.chunks; chunk++) {
      const float* part = job.partials + (((size_t)image * job.chunks + chunk) * job.groups + group) * 2;
      total = join(total, {(float)pixels_of_chunk(job, chunk) * width, part[0], part[1]});
    }
    norms[group] = make_float2(total.mean, 1.0f / sqrtf(total.deviations / total.count + job.epsilon));
  }
  __syncthreads();

  SignOutputs out = {job.words, job.counts, job.magnitudes, job.divisor, job.channels};
  Team team = own_team();
  float limits[ROUNDS][8];
  float2 affines[ROUNDS][8];
  load_limits(job.thresholds, team, job.channels, limits);
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      int channel = first_channel(team, round) + i;
      affines[round][i] = make_float2(0.0f, 0.0f);
      if (channel < job.channels) affines[round][i] = affine(job, image, channel, norms[channel / width]);
    }
  }
  for (int first = 0; first < job.pixels; first += team.count) {
    int within = first + team.index, pixel = image * job.pixels + within;
    bool exists = within < job.pixels;
    PixelSums sums = {0, 0.0f};
    size_t place = (size_t)pixel * job.channels;
#pragma unroll
    for (int start = 0; start < ROUNDS; start += AHEAD) {
      float values[AHEAD][8];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        int channel = first_channel(team, start + i);
        if (exists) load_channels(job.x + place, channel, job.channels, job.aligned, values[i]);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        if (!exists || start + i >= ROUNDS) continue;
        int channel = first_channel(team, start + i);
        apply(affines[start + i], job.silu, values[i]);
        if (job.activations)
          store_channels(job.activations + place, channel, job.channels, job.aligned, values[i]);
        if (job.words) store_byte(out, pixel, channel, sign_byte(values[i], limits[start + i], sums));
      }
    }
    if (job.words) store_sums(out, team, pixel, exists, sums);
  }
}
