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
  int aligned;               // whether eight channels may be loaded at once
};

extern "C" __global__ void __launch_bounds__(256) pack(PackJob job) {
  SignOutputs out = {job.words, job.counts, job.magnitudes, job.divisor, job.channels};
  Team team = own_team();
  float limits[ROUNDS][8];
  load_limits(job.thresholds, team, job.channels, limits);
  for (int first = 0; first < job.pixels; first += team.count) {
    int pixel = first + team.index;
    bool exists = pixel < job.pixels;   // no early exit: store_sums needs every lane of the warp
    const Activation* source = job.x + (size_t)pixel * job.channels;
    PixelSums sums = {0, 0.0f};
#pragma unroll
    for (int start = 0; start < ROUNDS; start += AHEAD) {
      float values[AHEAD][8];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        int channel = first_channel(team, start + i);
        if (exists) load_channels(source, channel, job.channels, job.aligned, values[i]);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        if (!exists || start + i >= ROUNDS) continue;
        unsigned byte = sign_byte(values[i], limits[start + i], sums);
        store_byte(out, pixel, first_channel(team, start + i), byte);
      }
    }
    store_sums(out, team, pixel, exists, sums);
  }
}
