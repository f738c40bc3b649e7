// Binarize and pack: activations with the channels last become words, with counts and a magnitude per pixel.
#include "device.cuh"
#include "signs.cuh"

struct PackArgs {
  const Activation* x;       // [pixels, channels]
  const float* thresholds;   // [PLANES, channels]: tau, then delta of each further plane; null: one plane, no tau
  Word* words;               // [pixels, PLANES, ceil(channels / 32)]
  int* counts;               // [pixels, PLANES]
  float* magnitudes;         // [pixels], or null
  float divisor;             // of the magnitudes
  int pixels;
  int channels;
  int aligned;               // 1: eight channels may be loaded at once
};

extern "C" __global__ void __launch_bounds__(256) pack(PackArgs args) {
  SHARED_MEMORY(memory);
  float* offsets = reinterpret_cast<float*>(memory);   // [OFFSETS]
  if (PLANES > 1) {
    load_offsets(args.thresholds, args.channels, offsets);
    __syncthreads();  // they are there
  }
  SignOutputs out = {args.words, args.counts, args.magnitudes, args.divisor, args.channels};
  PixelLanes lanes = own_lanes();
  float limits[ROUNDS][8];
  load_limits(args.thresholds, lanes, args.channels, limits);
  for (int first = 0; first < args.pixels; first += lanes.count) {
    int pixel = first + lanes.index;
    bool exists = pixel < args.pixels;   // no early exit: store_sums needs every lane of the warp
    const Activation* source = args.x + (size_t)pixel * args.channels;
    PixelSums sums = {};
#pragma unroll
    for (int start = 0; start < ROUNDS; start += PREFETCH) {
      float values[PREFETCH][8];
#pragma unroll
      for (int i = 0; i < PREFETCH; i++) {
        int channel = first_channel(lanes, start + i);
        if (exists) load_channels(source, channel, args.channels, args.aligned, values[i]);
      }
#pragma unroll
      for (int i = 0; i < PREFETCH; i++) {
        if (!exists || start + i >= ROUNDS) continue;
        int channel = first_channel(lanes, start + i);
        unsigned bytes[PLANES];
        sign_bytes(values[i], limits[start + i], offsets + channel / 8, sums, bytes);
        store_bytes(out, pixel, channel, bytes);
      }
    }
    store_sums(out, lanes, pixel, exists, sums);
  }
}
