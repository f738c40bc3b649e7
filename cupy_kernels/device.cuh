// Shared by all kernels: packed words, the type of the activations, shared memory, and the instructions that
// exist only as PTX. No header is included anywhere, so NVRTC compiles this without a CUDA toolkit.
//
// The tests compile the same files with g++ for a CPU. Then ON_HOST is defined, and the rest comes
// from tests/kernels/cuda_host.h.

// Compiled for PLANES activation planes, 1 to 3: activations are b_1 + g_1 b_2 + g_2 b_3 with signs b_i.

// 32 channels of one pixel and plane, or of one kernel tap. Bit 1 stands for +1. Bit 0 stands for -1, or for nothing: in
// the surplus of the last word, and in words outside the image.
typedef unsigned Word;

#ifndef ON_HOST

// All shared memory is dynamic, so that the tests can fill it with garbage and watch its end.
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

__device__ __forceinline__ float half_to_float(unsigned short value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
  unsigned short result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}

#if __CUDA_ARCH__ < 800
#define EMULATE_BMMA   // sm_75 has only the xor form; newer ones without binary tensor cores emulate by themselves
#else
__device__ __forceinline__ void bmma_instruction(int (&d)[4], const Word (&a)[4], const Word (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#endif  // ON_HOST

// D += popcount(A & B) over 256 bits, A 16 rows, B 8 columns, by one warp. With g = lane / 4 and t = lane % 4
// a lane holds, in words of 32 bits of the 256,
//     a: A[g][t], A[g + 8][t], A[g][t + 4], A[g + 8][t + 4]     b: B[t][g], B[t + 4][g]
//     d: D[g][2t], D[g][2t + 1], D[g + 8][2t], D[g + 8][2t + 1]
__device__ __forceinline__ void bmma(int (&d)[4], const Word (&a)[4], const Word (&b)[2]) {
#ifdef EMULATE_BMMA
  int lane = threadIdx.x & 31, row = lane & ~3, column = 2 * (lane & 3);
#pragma unroll
  for (int word = 0; word < 4; word++) {
    Word high[4];
#pragma unroll
    for (int i = 0; i < 4; i++) high[i] = __shfl_sync(~0u, a[i], row + word);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      Word low = __shfl_sync(~0u, b[0], 4 * (column + e) + word);
      Word rest = __shfl_sync(~0u, b[1], 4 * (column + e) + word);
      d[e] += __popc(high[0] & low) + __popc(high[2] & rest);
      d[2 + e] += __popc(high[1] & low) + __popc(high[3] & rest);
    }
  }
#else
  bmma_instruction(d, a, b);
#endif
}

// Activations are float32, float16 or bfloat16, as the network computes; everything else is float32.
#if defined(ACTIVATION_FLOAT32)
typedef float Activation;
__device__ __forceinline__ float to_float(Activation value) { return value; }
__device__ __forceinline__ Activation from_float(float value) { return value; }
#elif defined(ACTIVATION_FLOAT16)
typedef unsigned short Activation;
__device__ __forceinline__ float to_float(Activation value) { return half_to_float(value); }
__device__ __forceinline__ Activation from_float(float value) { return float_to_half(value); }
#elif defined(ACTIVATION_BFLOAT16)
typedef unsigned short Activation;
__device__ __forceinline__ float to_float(Activation value) { return __uint_as_float((unsigned)value << 16); }
__device__ __forceinline__ Activation from_float(float value) {
  unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;       // NaN must not round to infinity
  return (Activation)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);   // to nearest, ties to even
}
#else
#error "define ACTIVATION_FLOAT32, ACTIVATION_FLOAT16 or ACTIVATION_BFLOAT16"
#endif

// Eight neighbouring activations at an address divisible by 16.
__device__ __forceinline__ void load_eight(const Activation* source, float (&values)[8]) {
#ifdef ACTIVATION_FLOAT32
  const float4* pairs = reinterpret_cast<const float4*>(source);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float4 four = pairs[i];
    values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
  }
#else
  uint4 packed = *reinterpret_cast<const uint4*>(source);
  unsigned two[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[2 * i] = to_float((Activation)(two[i] & 0xffffu));
    values[2 * i + 1] = to_float((Activation)(two[i] >> 16));
  }
#endif
}

__device__ __forceinline__ void store_eight(Activation* target, const float (&values)[8]) {
#ifdef ACTIVATION_FLOAT32
  float4* pairs = reinterpret_cast<float4*>(target);
  pairs[0] = make_float4(values[0], values[1], values[2], values[3]);
  pairs[1] = make_float4(values[4], values[5], values[6], values[7]);
#else
  unsigned two[4];
#pragma unroll
  for (int i = 0; i < 4; i++) two[i] = from_float(values[2 * i]) | (unsigned)from_float(values[2 * i + 1]) << 16;
  *reinterpret_cast<uint4*>(target) = make_uint4(two[0], two[1], two[2], two[3]);
#endif
}

// Two neighbouring activations. `paired`: the address is divisible by twice their size. `second`: both exist.
__device__ __forceinline__ float2 load_two(const Activation* source, bool paired, bool second) {
  if (!paired) return make_float2(to_float(source[0]), second ? to_float(source[1]) : 0.0f);
#ifdef ACTIVATION_FLOAT32
  return *reinterpret_cast<const float2*>(source);
#else
  unsigned two = *reinterpret_cast<const unsigned*>(source);
  return make_float2(to_float((Activation)(two & 0xffffu)), to_float((Activation)(two >> 16)));
#endif
}

__device__ __forceinline__ void store_two(Activation* target, float2 values, bool paired, bool second) {
  if (!paired) {
    target[0] = from_float(values.x);
    if (second) target[1] = from_float(values.y);
    return;
  }
#ifdef ACTIVATION_FLOAT32
  *reinterpret_cast<float2*>(target) = values;
#else
  *reinterpret_cast<unsigned*>(target) = from_float(values.x) | (unsigned)from_float(values.y) << 16;
#endif
}
