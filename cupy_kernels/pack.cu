// Binarize and pack: activations with the channels last become words, with a count and a magnitude a pixel.
#include "device.cuh"
#include "signs.cuh"

struct PackJob {
  const Activation* x;       // [pixels, channels]
  const float* thresholds;   // tau [channels], or null
  Word* words;               // [pixels, ceil(channels / 32)]
  int* counts;               // [pixels]
  float* magnitudes;         // [pixels], or null
  float divisor;             // of the magnitudes
  int pixels;
  int channels;
  int lanes;                 // of a warp that share a pixel: a power of two, at most 32
  int aligned;               // whether eight channels may be loaded at once
};

extern "C" __global__ void __launch_bounds__(256) pack(PackJob job) {
  SignOutputs out = {job.words, job.counts, job.magnitudes, job.divisor};
  int lane = threadIdx.x & (job.lanes - 1);
  int team = (blockIdx.x * blockDim.x + threadIdx.x) / job.lanes, teams = gridDim.x * blockDim.x / job.lanes;
  int bytes = (job.channels + 31) / 32 * 4;
  for (int first = 0; first < job.pixels; first += teams) {
    int pixel = first + team;
    bool exists = pixel < job.pixels;   // no early exit: the sums below need every lane of the warp
    PixelSums sums = {0, 0.0f};
    for (int byte = lane; exists && byte < bytes; byte += job.lanes) {
      const Activation* source = job.x + (size_t)pixel * job.channels + 8 * byte;
      float values[8] = {};
      if (job.aligned && 8 * byte + 8 <= job.channels) {
        load_eight(source, values);
      } else {
        for (int i = 0; i < 8; i++)
          if (8 * byte + i < job.channels) values[i] = to_float(source[i]);
      }
      bytes_of(out, pixel, job.channels)[byte] =
          (unsigned char)sign_byte(values, job.thresholds, 8 * byte, job.channels, sums);
    }
    sums = over_lanes(sums, job.lanes);
    if (exists && lane == 0) store_sums(out, pixel, sums);
  }
}
